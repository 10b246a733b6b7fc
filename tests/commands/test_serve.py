"""`cald-speech serve`: its options reach the server, and what cannot be served ends before the model is loaded."""

import importlib.util
import re
import signal
import socket
import subprocess
import sys

import pytest

from cald_speech.commands import serve as command

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "python_multipart"))), reason="needs the extra `serve`"
)


def test_options_reach_the_server(call, model, talk, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run_server", lambda *given: seen.append(given))
    options = ["--model_name", "mine", "--language", "en", "--max_queue", 3, "--max_upload_mb", 2.5]
    options += ["--upload_folder", tmp_path, "--decoding", "beam", "--beam_width", 4, "--tail_s", 0, "--chunk_s", 5]
    options += ["--lookahead", 2, "--live_chunk_s", 0.25, "--max_live", 1, "--statistics", talk]
    told = call("serve", model, "--port", 0, *options).stderr
    (_, settings, listening), *_ = seen
    with listening:
        assert f"serving mine at http://127.0.0.1:{listening.getsockname()[1]}/" in told and "warning" not in told
    assert (settings.model_name, settings.language, settings.max_queue) == ("mine", "en", 3)
    assert (settings.max_upload_mb, settings.upload_folder) == (2.5, tmp_path)
    given = settings.decoding | settings.options
    assert (given["decoding"], given["beam_width"], given["margins"].tail_s, given["chunk_s"]) == ("beam", 4, 0, 5)
    live = settings.live
    assert (live.lookahead_s, live.chunk_s, live.max_live, live.statistics.num_samples) == (2, 0.25, 1, 12 * 16_000)


def test_a_model_that_cannot_read_live_serves_recordings(call, kept, causal, monkeypatch):
    monkeypatch.setattr(command, "run_server", lambda *given: given[2].close())
    assert "live audio is refused: a model can run live" in call("serve", kept, "--port", 0, "--force").stderr
    told = call("serve", kept, "--port", 0, "--force", "--lookahead_s", 1, status=2).stderr
    assert told.startswith("error: a model can run live")
    assert "--lookahead_s: does nothing here" in call("serve", causal, "--port", 0, "--lookahead_s", 1, status=2).stderr


def test_what_cannot_be_served(call, model, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be had" in call("serve", model, "--port", port, status=2).stderr
    assert "cannot be had" in call("serve", model, "--host", "no such host", status=2).stderr
    assert "there is no folder" in call("serve", "nowhere/at/all", "--port", 0, status=2).stderr
    assert "--beam_width: does nothing here" in call("serve", model, "--beam_width", 4, status=2).stderr
    monkeypatch.setattr("cald_speech.serving.app.find_spec", lambda name: None)
    assert "pip install 'cald-speech[serve]'" in call("serve", model, status=2).stderr


@pytest.mark.wide  # a Python process that serves
def test_ctrl_c_ends_it_with_130(model, repository):
    program = [sys.executable, "-c", "from cald_speech.commands import main; main()", "serve", model, "--port", "0"]
    process = subprocess.Popen(
        program,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        told = process.stderr.readline()
        port = int(re.search(r":(\d+)/ until", told)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in client.recv(1000)
        process.send_signal(signal.SIGINT)
        _, report = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in report, report
