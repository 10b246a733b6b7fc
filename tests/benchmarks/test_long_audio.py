"""The long-audio benchmark runs, what cannot run is a row, and a figure is drawn."""

import json
import subprocess

import pytest
import torch

from cald_speech.benchmarks import long_audio, long_audio_case
from cald_speech.data.audio import SAMPLE_RATE, write_audio
from cald_speech.errors import UserError
from tests.training.miniature import ROOT, write_model

YAML = ROOT / "hparams" / "long_audio.yaml"
TINY = """
config: !new:transformers.Wav2Vec2Config
    hidden_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
    intermediate_size: 64
    conv_dim: [8, 8, 8]
    conv_kernel: [10, 8, 8]
    conv_stride: [8, 8, 5]
    layerdrop: 0.0
"""


@pytest.fixture
def experiment(tmp_path):
    """The shipped yaml with a tiny model in the place of wav2vec2-base."""
    text = YAML.read_text()
    start, stop = text.index("config: !new"), text.index("layer_map:")
    (tmp_path / "tiny.yaml").write_text(text[:start] + TINY.lstrip() + text[stop:])
    return tmp_path / "tiny.yaml"


def run(capsys, experiment, tmp_path, *words):
    long_audio.main([str(experiment), "--device", "cpu", "--output_folder", str(tmp_path / "out"), *words])
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


@pytest.fixture
def in_one_process(monkeypatch):
    """Cases run here, since a process of its own for each takes seconds to import the libraries."""
    monkeypatch.setattr(long_audio, "run_case", lambda case, limit_s: long_audio_case.run(case))
    monkeypatch.setattr(long_audio_case.resource, "setrlimit", lambda *limits: None)


def test_every_system_that_can_run_does(experiment, tmp_path, capsys, in_one_process):
    rows = run(capsys, experiment, tmp_path, "--durations", "1")
    assert [row["system"] for row in rows] == list(long_audio.load(YAML, {}).systems)
    faults = {row["system"]: row["fault"] for row in rows if "fault" in row}
    assert list(faults) == ["teacher, flash"] and "flash" in faults["teacher, flash"].lower()
    for row in rows:
        if "fault" not in row:
            assert 0 < row["seconds"] == pytest.approx(row["real-time factor"] * row["duration_s"])
            assert row["peak GiB"] > 0.1 and "WER %" not in row
    assert (tmp_path / "out" / "long_audio.png").stat().st_size > 10_000


@pytest.mark.slow  # a Python process that imports the libraries
def test_a_case_has_a_process_of_its_own(experiment, tmp_path, capsys):
    (row,) = run(capsys, experiment, tmp_path, "--durations", "1", "--systems", "student, long form")
    assert row["seconds"] > 0 and 0.1 < row["peak GiB"] < 4


def test_with_trained_models_and_words(experiment, tmp_path, capsys, in_one_process):
    model = write_model(tmp_path / "model")
    write_audio(tmp_path / "a.flac", 0.1 * torch.randn(SAMPLE_RATE))
    entry = {"audio": str(tmp_path / "a.flac"), "duration_s": 1.0, "text": "AB C"}
    (tmp_path / "m.json").write_text(json.dumps({"a": entry}))
    words = ["--student", str(model), "--manifest", str(tmp_path / "m.json"), "--durations", "3"]
    rows = run(capsys, experiment, tmp_path, *words, "--systems", "student, long form", "student, whole")
    assert rows[0]["WER %"] == rows[1]["WER %"] > 0


@pytest.mark.parametrize("fault", ["out of memory", "more than 5 s"])
def test_a_case_that_fails_is_a_row_and_the_last_of_its_system(experiment, tmp_path, capsys, monkeypatch, fault):
    def fake(case, limit_s):
        assert limit_s == 5
        if case.get("attention") == "eager" and "/2.flac" in case["audio"]:
            return {"fault": fault}
        return {"seconds": 0.5, "peak_bytes": 2**30, "text": ""}

    monkeypatch.setattr(long_audio, "run_case", fake)
    rows = run(capsys, experiment, tmp_path, "--durations", "4", "1", "2", "--limit_s", "5")
    eager = [row for row in rows if row["system"] == "teacher, eager"]
    assert [row["duration_s"] for row in eager] == [1, 2] and eager[-1]["fault"] == fault
    assert sum(row["system"] == "student, whole" for row in rows) == 3


def test_a_case_in_too_little_time(tmp_path):
    assert long_audio.run_case({}, 0.01) == {"fault": "more than 0.01 s"}


@pytest.mark.parametrize(("status", "said"), [(-9, None), (1, "KeyError: 'model'")], ids=["killed", "wrong"])
def test_a_case_that_ends_without_an_answer(status, said, monkeypatch):
    """Killed for its memory it is a row; a wrong one is an error that says what Python said last."""
    ended = subprocess.CompletedProcess([], status, "", f"Traceback ...\n{said}\n")
    monkeypatch.setattr(long_audio.subprocess, "run", lambda command, **options: ended)
    if said is None:
        assert long_audio.run_case({}, 100) == {"fault": "out of memory"}
    else:
        with pytest.raises(UserError, match=f"the case {{}} failed: {said}"):
            long_audio.run_case({}, 100)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [("none.yaml", None, "no experiment file"), ("bad.yaml", "sistems: {}\n", "unknown keys sistems")],
)
def test_bad_experiments(tmp_path, capsys, name, text, expected):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="2"):
        long_audio.main([str(tmp_path / name)])
    assert expected in capsys.readouterr().err
