"""One label for an utterance: its loss, its labels, and what does not fit."""

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch.nn import functional as F
from transformers import Wav2Vec2Config

from cald_speech.data.manifests import write_manifest
from cald_speech.errors import UserError
from cald_speech.tasks.classification import Classification

TASK = Classification(["ON", "OFF", "UP"])


def batch(*labels):
    items = [{"id": str(i), "labels": torch.tensor([TASK.places[text]]), "text": text} for i, text in enumerate(labels)]
    return PaddedBatch(items)


def test_the_loss_is_a_sum_over_utterances():
    logits = torch.randn(3, 3)
    together = TASK.loss(logits, None, batch("UP", "ON", "OFF"))
    alone = [F.cross_entropy(logits[i : i + 1], torch.tensor([place])) for i, place in enumerate((2, 0, 1))]
    assert torch.allclose(together, sum(alone)) and TASK.units(batch("UP", "ON")).tolist() == [1, 1]


def test_results_and_score():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    results = TASK.results(logits, None, None, batch("ON", "OFF"), None)
    assert results == [("ON", "ON"), ("OFF", "UP")]
    assert TASK.score(dict(enumerate(results))) == 50.0


def test_a_head_must_know_the_same_labels():
    config = Wav2Vec2Config(id2label={0: "ON", 1: "OFF"}, architectures=["Wav2Vec2ForSequenceClassification"])
    with pytest.raises(UserError, match=r"'x' tells ON, OFF apart, and the task ON, OFF, UP"):
        TASK.head_options("x", config, None)
    options = TASK.head_options("x", Wav2Vec2Config(), None)
    assert options == {"id2label": {0: "ON", 1: "OFF", 2: "UP"}, "label2id": {"ON": 0, "OFF": 1, "UP": 2}}


def manifest(path, *labels):
    write_manifest(path, {str(i): {"audio": "a.flac", "duration_s": 1, "text": text} for i, text in enumerate(labels)})
    return path


def test_labels_of_the_training_set(tmp_path):
    task, train = Classification(), manifest(tmp_path / "train.json", "UP", "ON", "UP")
    processor = task.processor([], None, tmp_path, train, "none")
    assert task.labels == ["ON", "UP"]
    assert task.head_options("x", Wav2Vec2Config(), processor)["id2label"] == {0: "ON", 1: "UP"}
    other = manifest(tmp_path / "valid.json", "OFF")
    with pytest.raises(UserError, match=r"expected the labels ON, UP, got 'OFF' for utterance 0 .* Train on them too"):
        task.dataset(other, processor, normaliser="none", unknown="error")
    with pytest.raises(UserError, match="two or more labels to tell apart, got 'OFF' alone"):
        task.processor([], None, tmp_path, other, "none")


def test_many_labels_are_cut_in_messages():
    task = Classification([f"id{number}" for number in range(1_251)])
    config = Wav2Vec2Config(num_labels=1_300, architectures=["Wav2Vec2ForSequenceClassification"])
    with pytest.raises(UserError, match=r"and the task id0, .*, id9 and 1241 more: expected") as caught:
        task.head_options("x", config, None)
    assert len(str(caught.value)) < 500


def test_labels_that_are_given_stay(tmp_path):
    task = Classification(["UP", "ON"])
    task.processor([], None, tmp_path, manifest(tmp_path / "train.json", "ON"), "none")
    assert task.labels == ["UP", "ON"]


@pytest.mark.parametrize("labels", [[], ["ON"], ["ON", "ON"]])
def test_labels_that_tell_nothing_apart(labels):
    with pytest.raises(ValueError, match="labels: expected two or more names, each once"):
        Classification(labels)
