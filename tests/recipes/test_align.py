"""An encoder is converted on audio alone, and a recipe with labels goes on from it."""

import json

import numpy as np
import pytest
import soundfile
import torch

import cald_speech
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.recipes.align.prepare import prepare
from cald_speech.recipes.librispeech.prepare import prepare as librispeech
from cald_speech.training.run import run
from tests.training.miniature import ROOT, SPLITS, write_corpus, write_experiment, write_model

SMALL = {
    "num_steps": 30,
    "align_steps": 20,
    "max_batch_s": 5,
    "initialise": "random",
    "calibrate": 0,  # what starts at random has nothing to be drawn towards
    "num_workers": 0,
    "precision": "fp32",
    "accumulation": 1,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("LibriSpeech"))


@pytest.fixture(scope="module")
def aligned(corpus, tmp_path_factory):
    """A run of the recipe as it stands, but small; the encoder has no head, as self-supervised ones have none."""
    folder = tmp_path_factory.mktemp("aligned")
    encoder = write_model(folder / "encoder", head="base")
    keys = SMALL | {"data_folder": str(corpus), "output_folder": str(folder / "align"), "teacher": str(encoder)}
    words = [f"--{key}={value}" for key, value in (keys | {"corpus": json.dumps({"num_valid": 4})}).items()]
    return run(
        [str(ROOT / "hparams" / "align/encoder.yaml"), *words, "--log_every_steps=1", "--noprogressbar"], prepare
    )


@pytest.mark.slow  # a training
def test_the_encoder_comes_nearer_to_its_teacher(aligned):
    lines = [json.loads(line) for line in (aligned.store.folder / "train_log.jsonl").read_text().splitlines()]
    distances = [line["valid/distance"] for line in lines if "valid/distance" in line]
    assert distances[-1] < distances[0] and aligned.progress.best_metric == pytest.approx(min(distances), rel=1e-4)
    assert all("alignment/00" in line for line in lines if line["step"] < 20 and "loss/task" in line)
    model = cald_speech.from_pretrained(aligned.store.folder / "model", head="base")
    assert type(model).__name__ == "CaldWav2Vec2Model"


def test_a_recipe_with_labels_goes_on_from_it(aligned, corpus, tmp_path):
    keys = {"output_folder": str(tmp_path / "run"), "data_folder": str(corpus), "corpus": {"splits": SPLITS}}
    keys |= {"student": str(aligned.store.folder / "model"), "guidance": "unguided", "num_steps": 2, "max_batch_s": 4.0}
    brain = run(
        [str(write_experiment(tmp_path / "a.yaml", **keys)), "--learning_rate=0.0", "--noprogressbar"], librispeech
    )
    assert brain.models.conversion.layers == ("Bidirectional", "Bidirectional")
    before = aligned.plain.state_dict()
    after = brain.plain.base_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_manifests(corpus, tmp_path):
    manifests = {name: read_manifest(path) for name, path in prepare(corpus, tmp_path, num_valid=5).items()}
    assert len(manifests["valid"]) == 5 and len(manifests["train"]) == 19
    assert not manifests["valid"].keys() & manifests["train"].keys()
    shorter = prepare(corpus, tmp_path / "b", num_valid=2, longest_s=1.0)
    assert all(entry["duration_s"] <= 1.0 for path in shorter.values() for entry in read_manifest(path).values())


def test_what_cannot_be_used_is_named(corpus, tmp_path):
    with pytest.raises(UserError, match=r"at least two files of audio .* under .*nowhere, got 0 of 0"):
        prepare(tmp_path / "nowhere", tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.flac").write_bytes(b"no audio")
    with pytest.raises(UserError, match=r"1 of 1 files cannot, the first: .*a\.flac"):
        prepare(tmp_path / "bad", tmp_path)


def test_equal_names_are_two_utterances(tmp_path):
    """talk.wav beside talk.flac; what macOS leaves on foreign disks is no audio."""
    for name in ("talk.wav", "talk.flac"):
        soundfile.write(tmp_path / name, np.zeros(8_000), 16_000)
    (tmp_path / "._talk.wav").write_bytes(b"\0\5\26\7")
    sets = prepare(tmp_path, tmp_path / "out", num_valid=1)
    assert sorted(key for path in sets.values() for key in read_manifest(path)) == ["talk", "talk.wav"]
