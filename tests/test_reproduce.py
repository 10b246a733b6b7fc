"""scripts/reproduce.sh on a miniature of everything: it checks the teacher, goes on where it was, and compares."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forking import forking_python
from tests.training.miniature import ROOT, write_corpus, write_model

SCRIPT = ROOT / "scripts" / "reproduce.sh"
# Where the file GATE is, training says that it has begun and goes no further: the signal meant for it comes neither
# after its end nor while bash is about to start it. With FRESH=yes a new Python is started, else one is forked.
STAND_IN = """#!/bin/sh
case "$*" in *train.py*) [ ! -e "GATE" ] || { echo at the gate; exec sleep 600; } ;; esac
if [ "$FRESH" = yes ]; then exec "PYTHON" "$@"; fi
exec "FORKING" "$@"
"""
IMPORTS = (
    "cald_speech.recipes.librispeech.evaluate",
    "cald_speech.recipes.librispeech.prepare",
    "cald_speech.training.run",
)
SMALL = ["--", "--precision=fp32", "--num_workers=0", "--max_batch_s=5", "--accumulation=1", "--noprogressbar"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A teacher with random weights, and a corpus whose test-other is a copy of its test-clean."""
    folder = tmp_path_factory.mktemp("reproduce")
    corpus = write_corpus(folder / "LibriSpeech")
    shutil.copytree(corpus / "test-clean", corpus / "test-other")
    teacher = write_model(folder / "hub" / "teacher")
    own = {"TEACHER": teacher, "DATA": corpus, "OUTPUT": folder / "out", "STEPS": 2, "ALIGN_STEPS": 1}
    own |= {"DEVICE": "cpu", "DISK_GB": 0, "OMP_NUM_THREADS": 1}
    return os.environ | {key: str(value) for key, value in own.items()}


@pytest.fixture
def gate(tmp_path):
    return tmp_path / "gate"


@pytest.fixture
def python(tmp_path, gate):
    """STAND_IN, in the place of Python."""
    path = tmp_path / "python"
    with forking_python(IMPORTS) as forking:
        text = STAND_IN.replace("GATE", str(gate)).replace("PYTHON", sys.executable).replace("FORKING", str(forking))
        path.write_text(text)
        path.chmod(0o755)
        yield path


def reproduce(settings, *arguments, **changed):
    """Exit status, standard output, standard error."""
    done = subprocess.run(
        ["bash", SCRIPT, *arguments], env=settings | changed, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow  # eight Python processes do real work or look at what it left
def test_from_the_teacher_to_the_table(settings, python, gate):
    settings = settings | {"PYTHON": str(python)}
    every = {"TEACHER_WER_RANGE": "0 1000"}
    status, said, error = reproduce(settings, *SMALL, FRESH="yes")
    assert status == 3 and "is not within 1.5 2.3 (TEACHER_WER_RANGE)" in error
    assert "% WER on test-clean; expected: 1.5 2.3\n" in said and "test-other" not in said
    assert "stopped at" not in error

    gate.touch()
    command = ["bash", SCRIPT, *SMALL]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=settings | every, start_new_session=True, **pipes) as process:
        seen = []
        while not seen or "at the gate" not in seen[-1]:
            seen.append(process.stdout.readline())
            assert seen[-1], process.stderr.read()
        os.killpg(process.pid, signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    gate.unlink()
    assert "== teacher on test-clean: done before" in "".join(seen) and "; expected: 0 1000\n" in "".join(seen)
    assert process.returncode != 0 and "stopped at: align and distil. The same command goes on" in error

    status, said, error = reproduce(settings, *SMALL, **every)
    assert status == 0, error
    assert said.count("done before") == 2 and "== align and distil\n" in said
    check_table(said)

    model, report = (Path(settings["OUTPUT"]) / p for p in ("student/model", "evaluation/student/test-clean.json"))
    os.utime(report, (0, 0))  # as if the student had been trained on since
    status, said, error = reproduce(settings, *SMALL, **every, DISK_GB="100000000")
    assert status == 0 and said.count("done before") == 4, error
    assert said.count("$ ") == 1 and f"evaluate.py {model} " in said
    check_table(said)


def check_table(said):
    said = said.partition("== teacher and student")[2]
    rows = [line.split() for line in said.splitlines() if line.startswith("| test-")]
    assert [(row[1], row[3]) for row in rows] == [
        (split, model) for split in ("test-clean", "test-other") for model in ("teacher", "student")
    ]
    assert all(float(row[7]) <= float(row[5]) <= float(row[9]) for row in rows)
    assert said.count("student minus teacher: ") == 2 and "not measured by us" in said and "2.7 % relative" in said


@pytest.mark.parametrize(
    "arguments, changed, message",
    [
        (["--steps"], {}, "unknown option --steps; --help names"),
        ([], {"DATA": "/nowhere"}, "no folder train-clean-100 in DATA=/nowhere: unpack"),
        ([], {"TRAIN_SPLITS": "train-clean-100 train-clean-360"}, "no folder train-clean-360 in DATA="),
        ([], {"DISK_GB": "100000000"}, "DISK_GB=100000000 expected"),
        ([], {"PYTHON": "/bin/false"}, "/bin/false has no cald_speech"),
    ],
    ids=["option", "data", "split", "disk", "python"],
)
def test_what_is_wrong_is_named(settings, arguments, changed, message, tmp_path):
    status, said, error = reproduce(settings, *arguments, **{"OUTPUT": str(tmp_path), **changed})
    assert status == 2 and error.startswith("error: ") and message in error and not said


def test_help_names_every_setting(settings):
    status, said, _ = reproduce(settings, "--help")
    script = SCRIPT.read_text()
    names = re.findall(r"\$\{([A-Z_]+):[-=]", script)
    assert status == 0 and {"TEACHER", "SPLITS"} < set(names) and all(f"\n  {name} " in said for name in names)
    assert "ESTIMATES" in said and len(script.splitlines()) < 150


def test_two_at_once_are_refused(settings, tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        held = subprocess.Popen(["flock", str(tmp_path / "lock"), "sleep", "60"], stdout=lock)
        try:
            while subprocess.run(["flock", "-n", str(tmp_path / "lock"), "true"], check=False).returncode == 0:
                pass
            status, _, error = reproduce(settings, OUTPUT=str(tmp_path))
        finally:
            held.kill()
            held.wait()
    assert status == 2 and "in use by another run" in error
