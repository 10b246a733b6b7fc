"""What another process writes to is refused, before anything is written; its lock ends with it, however it ends."""

import subprocess
import sys

import pytest

HOLD = """
import sys
from contextlib import ExitStack
from cald_speech.files import locked
with ExitStack() as stack:
    for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
        stack.enter_context(locked(folder, name))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds a folder of transcripts, a report and a model's folder."""
    held = [tmp_path / "texts", "", tmp_path / "out", "manifest", tmp_path, "model"]
    command = [sys.executable, "-c", HOLD, *map(str, held)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_processes_never_write_to_one_place(call, place, other, tmp_path):
    commands = [
        ["transcribe", place / "0.wav", "--model", place / "student", "--output_folder", tmp_path / "texts"],
        ["evaluate", place / "student", place / "manifest.json", "--output_folder", tmp_path / "out", "--quiet"],
        ["convert", place / "source", tmp_path / "model"],
    ]
    for words in commands:
        said = call(*words, status=2).output
        assert f"is in use by another process (process {other.pid} on " in said and "wait for it or end it" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        ".lock",
        ".manifest.lock",
        ".model.lock",
        "out",
        "texts",
    ]
    call("evaluate", place / "student", place / "manifest.json", "--output_folder", tmp_path / "texts", "--quiet")
    other.kill()
    other.wait()
    for words in commands:
        call(*words)
    assert not list(tmp_path.rglob("*.lock"))
