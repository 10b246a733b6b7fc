"""The recipes as modules: two in one process, and one that trains in a process of its own."""

import pytest

import cald_speech
from cald_speech.recipes import train_apart
from cald_speech.training.run import run
from tests.training.miniature import SPLITS, write_corpus, write_experiment, write_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("LibriSpeech"))


def write(path, data, **keys):
    """An experiment of two steps on the miniature corpus."""
    keys |= {"output_folder": str(path.with_suffix("")), "num_steps": 2, "max_batch_s": 4.0}
    return write_experiment(path, data_folder=str(data), guidance="target", **keys)


def test_two_recipes_in_one_process(corpus, tmp_path):
    """Each has a prepare.py, and each experiment gets that of the recipe it names."""
    encoder = str(write_model(tmp_path / "encoder", head="base"))
    task = "!new:cald_speech.tasks.encoding.Encoding"
    first = write(tmp_path / "align.yaml", corpus, recipe="align", teacher=encoder, corpus={"num_valid": 4})
    first.write_text(first.read_text() + f"task: {task}\nalpha_task: 0.0\n")
    aligned = run([str(first), "--noprogressbar"])
    teacher = str(write_model(tmp_path / "teacher"))
    second = write(tmp_path / "ctc.yaml", corpus, recipe="librispeech", teacher=teacher, corpus={"splits": SPLITS})
    student = run([str(second), "--noprogressbar"])
    assert type(aligned.plain).__name__ == "CaldWav2Vec2Model" and type(student.plain).__name__ == "CaldWav2Vec2ForCTC"


@pytest.mark.slow  # a Python process that trains
def test_a_training_in_a_process_of_its_own(corpus, tmp_path):
    teacher = str(write_model(tmp_path / "teacher"))
    path = write(tmp_path / "a.yaml", corpus, recipe="librispeech", teacher=teacher, corpus={"splits": SPLITS})
    folder = tmp_path / "a"
    spent = train_apart(path, folder, ["--num_steps=1"])
    assert 0 < spent.seconds < 600 and 0 < spent.peak_gib < 16
    assert "trained for 1 steps" in (folder / "log.txt").read_text()
    assert cald_speech.from_pretrained(folder / "model").num_parameters() > 0
