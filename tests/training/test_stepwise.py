"""Layers that are converted while a run goes on: what the optimiser keeps, what is saved, how it is taken up again."""

import pytest
import torch

from cald_speech import from_pretrained
from cald_speech.conversion import ConversionReport
from cald_speech.errors import UserError
from cald_speech.tasks.ctc import CTC
from cald_speech.training.brain import CaldBrain
from cald_speech.training.optimiser import parameters_of
from tests.training.one_step import build
from tests.training.test_resume import Killed, assert_same_run, kill_after_step

# Two layers: the second is converted before step 1, the first before step 3.
KEYS = {"converted_at": [1, 3], "num_steps": 5, "checkpoint_every_steps": 1, "waypoint_every_steps": 1}
KEYS |= {"model_overrides": {"hidden_dropout": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2}}


def layers_of(folder):
    return ConversionReport.of(from_pretrained(folder)).layers


@pytest.mark.slow  # several trainings
@pytest.mark.parametrize("step", [1, 2, *(pytest.param(step, marks=pytest.mark.wide) for step in (3, 4))])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_bit(experiment, start, whole, monkeypatch, step):
    """Before the step at which a layer is due, and after it."""
    expected, path = whole(**KEYS).brain, experiment(**KEYS)
    with monkeypatch.context() as patch:
        kill_after_step(patch, step)
        with pytest.raises(Killed):
            start(path)
    assert_same_run(start(path), expected)


def test_every_folder_is_what_the_model_was(whole):
    folder = whole(**KEYS).brain.store.folder
    found = [layers_of(folder / "waypoints" / f"step-{step:07d}") for step in range(1, 6)]
    half = ("attention", "Bidirectional")
    assert found == [("attention",) * 2, half, half, *[("Bidirectional",) * 2] * 2]
    assert layers_of(folder / "model") == ("Bidirectional",) * 2
    assert "2 of 2 layers converted" in (folder / "model" / "README.md").read_text()


def test_the_best_model_is_one_of_the_last_group(experiment, start, monkeypatch):
    """However good those were that had more attention."""
    worse = iter(range(10, 100))
    monkeypatch.setattr(CTC, "score", lambda task, results: float(next(worse)))
    brain = start(experiment(**KEYS | {"num_steps": 4, "accumulation": 3, "max_batch_s": 20.0, "converted_at": [0, 3]}))
    assert len(brain.train_sampler.steps) == 2 and brain.progress.best_metric == 11.0
    assert layers_of(brain.store.folder / "model") == ("Bidirectional",) * 2


def test_the_optimiser_keeps_what_stays_and_knows_nothing_of_what_is_new(experiment, start, monkeypatch):
    seen, convert = [], CaldBrain._convert

    def watched(brain, step):
        state, before = brain.optimizer.state, dict(brain.plain.named_parameters())
        known = {name: {key: v.clone() for key, v in state[p].items()} for name, p in before.items() if p in state}
        convert(brain, step)
        after = dict(brain.plain.named_parameters())
        assert len(state) == len(known.keys() & after.keys()) > 0
        for name in known.keys() & after.keys():
            assert after[name] is before[name]
            assert all(torch.equal(state[after[name]][key], v) for key, v in known[name].items())
        trained = {id(p) for p in after.values() if p.requires_grad}
        assert {id(p) for p in parameters_of(brain.optimizer)} == trained
        seen.append({name for name in after if name not in before})

    monkeypatch.setattr(CaldBrain, "_convert", watched)
    brain = start(experiment(**KEYS))
    assert len(seen) == 2 and all(".layers.1." in name for name in seen[0]) and all(".layers.0." in n for n in seen[1])
    new = [p for name, p in brain.plain.named_parameters() if name in seen[0] | seen[1]]
    assert all(brain.optimizer.state[p]["step"] in (2, 4) for p in new), "they train from when they are there"


def test_a_mixer_starts_from_what_its_attention_has_become(experiment, start, monkeypatch):
    started, convert = [], CaldBrain._convert

    def watched(brain, step):
        index = 1 if step == 1 else 0
        attention = brain.models.family.layers(brain.plain)[index].attention.out_proj.weight.detach().clone()
        convert(brain, step)
        mixer = brain.models.family.mixer(brain.models.family.layers(brain.plain)[index])
        started.append((attention, mixer.forwards.out_proj.weight.detach().clone()))

    monkeypatch.setattr(CaldBrain, "_convert", watched)
    start(experiment(**KEYS))
    assert all(torch.equal(attention, mixer) for attention, mixer in started) and len(started) == 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"converted_at": [0, 9]}, "steps: expected steps below num_steps, 5, .* got 9"),
        ({"converted_at": [0, 1, 2]}, "steps: expected at most 2 steps, one for each layer"),
        ({"converted_at": [2, 1]}, r"steps: expected optimiser steps that ascend, .* got \[2, 1\]"),
        ({"convert": False}, "steps: expected at most 0 steps"),
        ({"calibrate": 12}, "calibrate: expected layers that are all converted before the first step"),
        ({"align_steps": 2}, "steps: expected the first at 0, since align_steps trains mixers alone"),
        ({"student": "somewhere"}, "conversion_schedule: expected a model that is converted in this run"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_a_schedule_is_refused(experiment, keys, said):
    with pytest.raises(UserError, match=f"{said}"):
        build([str(experiment(**KEYS | keys))])
