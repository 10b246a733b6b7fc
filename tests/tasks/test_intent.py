"""Scenario and action from one head: the loss of both, the labels of both, and what does not fit."""

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch.nn import functional as F
from transformers import Wav2Vec2Config

from cald_speech.data.manifests import write_manifest
from cald_speech.errors import UserError
from cald_speech.tasks.intent import Intent, LabelGroups

GROUPS = {"scenario": ["alarm", "music", "iot"], "action": ["set", "hue_lighton"]}
NAMES = ["scenario:alarm", "scenario:music", "scenario:iot", "action:set", "action:hue_lighton"]
TASK = Intent(GROUPS)


def batch(*texts):
    items = [{"id": str(i), "labels": torch.tensor(TASK.groups.places(t)), "text": t} for i, t in enumerate(texts)]
    return PaddedBatch(items)


def manifest(folder, *texts):
    entries = {f"u{i}": {"audio": f"/{i}.flac", "duration_s": 1.0, "text": text} for i, text in enumerate(texts)}
    write_manifest(folder / "train.json", entries)
    return folder / "train.json"


def read(task, path):
    return task.processor([], None, path.parent, path, "librispeech")


def test_the_loss_is_the_sum_of_both_groups_cross_entropies():
    logits, texts = torch.randn(3, 5), ("iot hue_lighton", "alarm set", "music set")
    scenario = F.cross_entropy(logits[:, :3], torch.tensor([2, 0, 1]), reduction="sum")
    action = F.cross_entropy(logits[:, 3:], torch.tensor([1, 0, 0]), reduction="sum")
    loss = TASK.loss(logits, None, batch(*texts))
    assert torch.allclose(loss, scenario + action) and TASK.units(batch(*texts)).tolist() == [1, 1, 1]
    half = TASK.loss(logits.bfloat16(), None, batch(*texts))
    assert half.dtype == torch.float32 and torch.allclose(
        half, TASK.loss(logits.bfloat16().float(), None, batch(*texts))
    )


def test_the_published_codes_division():
    """speech/models/model.py and train_distill.py: the mean over the groups, divided by the characters of the step."""
    texts = ("iot hue_lighton", "alarm set")
    items = [{"id": t, "labels": torch.tensor(TASK.groups.places(t)), "text": t, "num_characters": n}
             for t, n in zip(texts, (33, 7), strict=True)]  # fmt: skip
    task, unequal, logits = (
        Intent(GROUPS, over_groups="mean", units_per_utterance="characters"),
        PaddedBatch(items),
        torch.randn(2, 5),
    )
    each = [F.cross_entropy(part, unequal.labels.data[:, i].long(), reduction="none")
            for i, part in enumerate((logits[:, :3], logits[:, 3:]))]  # fmt: skip
    literal = sum(losses.sum() for losses in each) / len(each) / (33 + 7)
    assert torch.allclose(task.loss(logits, None, unequal) / task.units(unequal).sum(), literal)
    assert Intent(GROUPS, units_per_utterance=3).units(unequal).tolist() == [3, 3]


def test_characters_that_no_entry_counts(tmp_path):
    task = Intent(GROUPS, units_per_utterance="characters")
    path = manifest(tmp_path, "alarm set")
    with pytest.raises(UserError, match=r'utterance u0: expected "num_characters", a number .*, got None'):
        task.dataset(path, read(task, path), normaliser="librispeech", unknown="error")
    with pytest.raises(ValueError, match="units_per_utterance: expected a number from 1 on, or characters, got 0"):
        Intent(GROUPS, units_per_utterance=0)
    with pytest.raises(ValueError, match="over_groups: expected sum or mean, got 'max'"):
        Intent(GROUPS, over_groups="max")


def test_a_group_does_not_see_the_others_outputs():
    logits = torch.randn(2, 5)
    raised = logits + torch.tensor([9.0, 9.0, 9.0, 0.0, 0.0])
    text = ("iot hue_lighton", "alarm set")
    assert torch.allclose(TASK.loss(logits, None, batch(*text)), TASK.loss(raised, None, batch(*text)), atol=1e-5)
    assert [part.shape for part in TASK.distributions(logits[:, None])] == [(2, 1, 3), (2, 1, 2)]
    assert torch.equal(torch.cat(list(TASK.distributions(logits)), dim=-1), logits)


def test_right_only_if_all_groups_are():
    logits = torch.tensor([[3.0, 1.0, 0.0, 0.0, 9.0], [0.0, 0.0, 2.0, 7.0, 6.0], [0.0, 1.0, 0.0, 1.0, 0.0]])
    results = TASK.results(logits, None, None, batch("alarm hue_lighton", "iot hue_lighton", "music set"), None)
    assert results == [("alarm hue_lighton",) * 2, ("iot hue_lighton", "iot set"), ("music set", "music set")]
    assert TASK.score(dict(enumerate(results))) == pytest.approx(100 / 3) and TASK.metric == "error"


def test_the_config_names_every_output():
    options = TASK.head_options("x", Wav2Vec2Config(), None)
    assert options["id2label"] == dict(enumerate(NAMES)) and Wav2Vec2Config(**options).num_labels == 5
    assert {options["label2id"][name] for name in NAMES} == set(range(5))
    config = Wav2Vec2Config(**options, architectures=["CaldWav2Vec2ForSequenceClassification"])
    assert TASK.head_options("x", config, None) == options
    other = Intent({**GROUPS, "action": ["hue_lighton", "set"]})
    with pytest.raises(UserError, match=r"'x' tells scenario:alarm, .* apart, and the task scenario:alarm, .*order"):
        other.head_options("x", config, None)


def test_labels_of_the_training_manifest(tmp_path):
    task = Intent(["scenario", "action"])
    read(task, manifest(tmp_path, "music set", "alarm set", "music query"))
    assert task.labels == ["scenario:alarm", "scenario:music", "action:query", "action:set"]
    path = manifest(tmp_path, "alarm query")
    dataset = task.dataset(path, read(TASK, path), normaliser="none", unknown="error")
    with dataset.output_keys_as(["labels", "text"]):
        assert dataset[0]["labels"].tolist() == [0, 0] and dataset[0]["text"] == "alarm query"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["alarm set", "alarm"], "utterance u1: expected a label each for scenario, action, got 'alarm'"),
        (["alarm set", "alarm query"], "two or more labels of scenario to tell apart, got alarm alone"),
    ],
)
def test_a_training_manifest_without_groups(tmp_path, texts, message):
    with pytest.raises(UserError, match=message):
        read(Intent(["scenario", "action"]), manifest(tmp_path, *texts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alarm", r"labels of the task, a label each for scenario, action, in that order, .* got 'alarm' \(1 such"),
        ("alarm set now", "a label each for scenario, action"),
        ("set alarm", "as scenario one of alarm, music, iot, got 'set alarm'"),
        ("alarm query", "as action one of set, hue_lighton, got 'alarm query'"),
    ],
)
def test_labels_that_the_task_does_not_know(tmp_path, text, message):
    path = manifest(tmp_path, "music set", text)
    with pytest.raises(UserError, match=rf"train\.json: utterance u1: expected .*{message}"):
        TASK.dataset(path, read(TASK, path), normaliser="none", unknown="error")


@pytest.mark.parametrize(
    "groups",
    [
        {},
        ["scenario"],
        ["a", "a"],
        ["a:b", "c"],
        {"scenario": ["a", "b"]},
        {"a": ["x"], "b": ["y", "z"]},
        {"a": ["x", "x"], "b": ["y", "z"]},
        {"a": ["x y", "x"], "b": ["y", "z"]},
        {"a": ["", "x"], "b": ["y", "z"]},
    ],
)
def test_groups_that_tell_nothing_apart(groups):
    with pytest.raises(ValueError, match="groups: expected two or more"):
        Intent(groups)


@pytest.mark.parametrize(
    "names",
    [["yes", "no"], ["drip coffee", "at: noon"], ["a:x", "b:x"], ["a:x", "a:y"], ["a:x", "b:x", "a:y", "b:y"], [""]],
)
def test_names_of_one_group(names):
    groups = LabelGroups.of(names)
    assert groups.groups == {"": names} and groups.names == names
    assert [groups.places(name) for name in names] == [[i] for i in range(len(names))]
    assert groups.guesses(torch.eye(len(names))) == names


def test_names_of_several_groups():
    groups = LabelGroups.of(NAMES)
    assert groups.groups == GROUPS and groups.names == NAMES
    assert groups.guesses(torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0]])) == ["music hue_lighton"]
