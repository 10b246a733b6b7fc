"""`cald-speech drift` and `layers`: tables, files and last lines. What they refuse is tested with their functions."""

import json

import pytest


@pytest.mark.parametrize(
    ("words", "name", "told"),
    [
        (["drift", "teacher", "source", "manifest.json"], "drift", "guidance suggested"),
        (["layers", "teacher", "manifest.json", "--keep", 2], "layer_importance", "layer_map:\n    overrides: {"),
        (["layers", "teacher", "manifest.json", "--student", "student"], "layer_importance", "The whole student"),
    ],
    ids=["drift", "layers", "layers of a student"],
)
def test_what_is_printed_and_written(call, place, tmp_path, monkeypatch, words, name, told):
    monkeypatch.chdir(place)
    done = call(*words, "--output_folder", tmp_path / "out", "--quiet")
    assert told in done.stdout and done.stderr == ""
    assert json.loads((tmp_path / "out" / f"{name}.json").read_text()) == json.loads(done.stdout.splitlines()[-1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.json", f"{name}.png"]
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["drift", "teacher", "student", "manifest.json"], "expected a model with attention in every layer"),
        (["drift", "teacher", "source", "manifest.json", "--output", "manifest.json"], "expected a folder to write to"),
        (["drift", "teacher", "source", "manifest.json", "--max_batch_tokens", 9], "--max_batch_tokens: does nothing"),
        (["layers", "teacher", "manifest.json", "--student", "student", "--seed", 9], "--seed: does nothing here"),
        (["layers", "teacher", "manifest.json", "--keep", 4], "--keep: expected from 1 to 3"),
        (
            ["layers", "teacher", "manifest.json", "--student", "student", "--mixer", "Hydra"],
            "expected --student or --mixer, got both",
        ),
    ],
    ids=["converted", "no folder", "tokens of audio", "a seed of nothing", "too many to keep", "student and mixer"],
)
def test_what_is_refused(call, place, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(place)
    done = call(*words, *([] if "--output" in words else ["--output", tmp_path / "out"]), status=2)
    assert told in done.stderr and done.stdout == ""
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
