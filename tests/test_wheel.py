"""The wheel: what is in it, and the commands from it, in a folder where there is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest

from tests.conftest import once_for_all_workers
from tests.training.miniature import ROOT, SPLITS, write_corpus, write_model

NEEDED = 77  # of setuptools, as pyproject.toml says
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        int(version("setuptools").split(".")[0]) < NEEDED,
        reason=f"building a wheel without the network needs setuptools {NEEDED}: pip install 'cald-speech[dev]'",
    ),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources: building leaves files beside them."""

    def build(folder):
        sources = folder / "sources"
        for name in ("cald_speech", "recipes", "hparams"):
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, sources)
        pip(folder, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, sources)

    (path,) = once_for_all_workers(tmp_path_factory, "wheel", build).glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that it was installed to."""
    folder = tmp_path_factory.mktemp("installed")
    pip(folder, "install", "--no-index", "--no-deps", "--target", folder, wheel)
    return folder


def pip(cwd, *words):
    command = [sys.executable, "-m", "pip", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_recipes_and_experiments_are_data_inside_the_package(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in files} == {"cald_speech", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    shipped = [path for folder in ("recipes", "hparams") for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {f"cald_speech/{path.relative_to(ROOT)}" for path in shipped if path.suffix != ".pyc"}
    assert len(wanted) > 80 and wanted <= files
    assert {"cald_speech/recipes/__init__.py", "cald_speech/py.typed"} < files
    assert any(re.fullmatch(r"cald_speech/ops/.*\.c", name) for name in files)
    assert wheel.stat().st_size < 10_000_000


# Four commands in one process, for starting one takes seconds; so does the fresh Python that the doctor starts, which
# tests/commands/test_doctor.py looks at.
TRAIN_READ_AND_DIAGNOSE = """
import sys
import cald_speech
from cald_speech.commands import doctor, main

audio, place, *words = sys.argv[1:]
doctor.import_error = exec
SHIPPED = ["transcribe", audio, "--model", "recipes/demo/teacher", "--force"]
print(cald_speech.__file__)
for command in (["train", *words], ["transcribe", audio, "--model", "results/mamba/model"], SHIPPED, ["doctor"]):
    assert main(command, standalone_mode=False) == 0, command

from cald_speech.recipes.demo import run as demo
from cald_speech.training.run import parse

assert parse(["hparams/demo/students.yaml"])[0].teacher == str(demo.TEACHER) and demo.TEACHER.is_dir()
assert (demo.ROOT / "recipes/librispeech/train.py").is_file() and str(demo.RESULTS).startswith(place)
"""


def test_the_commands_of_an_installed_wheel(installed, tmp_path):
    corpus, teacher = write_corpus(tmp_path / "LibriSpeech"), write_model(tmp_path / "teacher")
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*words):
        """From a folder that knows nothing of the checkout; what was printed."""
        options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
        done = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, env=environment, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "transcribe" in run(installed / "bin" / "cald-speech", "--help")
    keys = {"guidance": "target", "teacher": teacher, "data_folder": corpus, "corpus": json.dumps({"splits": SPLITS})}
    keys |= {"num_steps": 2, "max_batch_s": 5, "precision": "fp32", "num_workers": 0}
    words = ["hparams/mamba.yaml", *(f"--{key}={value}" for key, value in keys.items()), "--noprogressbar"]
    said = run("-c", TRAIN_READ_AND_DIAGNOSE, next(corpus.rglob("*.flac")), tmp_path, *words)
    assert said.startswith(str(installed)) and "broken: nothing" in said
    assert (tmp_path / "results/mamba/model/model.safetensors").is_file()
