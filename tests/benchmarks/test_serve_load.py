"""The benchmark of a server counts what is answered, lost and wrong, and sees what the server has open."""

import json
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from cald_speech.benchmarks import serve_load
from cald_speech.data.audio import SAMPLE_RATE, write_audio
from cald_speech.longform import Recogniser
from tests.serving.conftest import model, served, settings

__all__ = ["model", "settings"]


@pytest.fixture
def speech(tmp_path):
    """Two recordings of a second."""
    for name in "ab":
        write_audio(tmp_path / "speech" / f"{name}.flac", 0.1 * torch.randn(SAMPLE_RATE))
    return tmp_path / "speech"


@pytest.fixture
def here(model, settings, monkeypatch):
    """``here(max_queue)``: the server runs in this process, and no client is killed."""

    def serve_here(max_queue):
        @contextmanager
        def fake(folder, clients, uploads):
            asked = replace(settings, model_name="served", max_queue=max_queue, upload_folder=uploads)
            with served(Recogniser.of(folder), asked) as running:
                yield serve_load.Server(os.getpid(), int(running.url.rpartition(":")[2]))

        monkeypatch.setattr(serve_load, "served", fake)
        monkeypatch.setattr(serve_load, "killed", lambda *given: [])

    return serve_here


def run(capsys, model, speech, *, clients=3, status=0):
    words = [model, str(speech), "--clients", str(clients), "--seconds", "0.5", "--hours", "0.001"]
    assert serve_load.main(words) == status
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_is_answered_and_the_long_upload_is_measured(here, model, speech, capsys):
    here(3)
    found = run(capsys, model, speech)
    load, long = found["load"], found["long"]
    assert load["answers"] >= 3 and (load["lost"], load["wrong"]) == (0, 0)
    assert 0 < load["median_s"] <= load["p99_s"] <= load["slowest_s"]
    assert (long["status"], long["bytes"]) == (200, 44 + 2 * 57_600) and long["words"] > 0
    assert long["peak_bytes"] >= long["after_bytes"] > long["predicted_bytes"] > 0


def test_what_is_refused_is_lost_and_what_differs_is_wrong(here, model, speech, capsys, monkeypatch):
    here(0)
    assert run(capsys, model, speech, status=1)["load"]["lost"] > 0
    here(1)
    original, texts = serve_load.ask, iter(range(10**6))
    changed = lambda *given: (original(*given)[0], f'{{"text": "{next(texts)}"}}')  # noqa: E731
    monkeypatch.setattr(serve_load, "ask", changed)
    load = run(capsys, model, speech, clients=1, status=1)["load"]
    assert load["lost"] == 0 and load["wrong"] == load["answers"] > 0


def test_an_open_upload_is_seen(tmp_path):
    server = serve_load.Server(os.getpid(), 0)
    with (tmp_path / "upload").open("w"):
        assert server.uploads(tmp_path) == 1
    assert server.uploads(tmp_path) == 0


@pytest.mark.wide  # processes that import the libraries
def test_a_server_and_clients_of_their_own(model, settings, speech, capsys):
    words = [model, str(speech), "--clients", "2", "--seconds", "0.5", "--hours", "0.2", "--kills", "1"]
    assert serve_load.main(words) == 0
    (kill,) = json.loads(capsys.readouterr().out.splitlines()[-1])["killed"]
    assert kill["busy_before"] == 1 and kill["freed_after_s"] > 0


def test_no_recordings_no_benchmark(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        serve_load.main(["model", str(tmp_path)])
    assert ended.value.code == 2 and "expected recordings (.flac" in capsys.readouterr().err
