"""Slot alignment, of the mixers with the attention they replace: what trains, with what, when, and that it resumes."""

import json

import pytest
import torch

from cald_speech.distillation import layer_distances
from tests.helpers import worst_gradient
from tests.training.one_step import IN_BATCHES, JOINED, build, padded, step_gradients
from tests.training.test_resume import RESTLESS, Killed, assert_same_run, kill_after_step

ALIGNED = {"align_steps": 3, "num_steps": 6, "initialise": "random"}


def test_accumulated_equals_joined(experiment):
    brain, dataset = build([str(experiment(**ALIGNED))])
    joined = step_gradients(brain, padded(dataset, JOINED))
    brain.optimizer_step = 0
    error, name = worst_gradient(step_gradients(brain, padded(dataset, IN_BATCHES)), joined)
    assert error < 1e-5, name


def test_nothing_but_the_mixers_trains(experiment):
    brain, dataset = build([str(experiment(**ALIGNED))])
    before = {name: p.detach().clone() for name, p in brain.plain.named_parameters()}
    for _ in range(3):
        brain.fit_batch(padded(dataset, IN_BATCHES))
    moved = {name for name, p in brain.plain.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".mixer." in name}
    brain.fit_batch(padded(dataset, IN_BATCHES))
    moved = {name for name, p in brain.plain.named_parameters() if not torch.equal(p, before[name])}
    assert "lm_head.weight" in moved


def test_it_is_the_distance_from_the_attentions_output(experiment):
    """By taking the teacher's layers apart: each mixer gets what the attention gets."""
    brain, dataset = build([str(experiment(**ALIGNED))])
    batch = padded(dataset, [[7]])[0]
    family, wav = brain.models.family, batch.wav.data
    with torch.no_grad():
        hidden = brain.teacher(wav, output_hidden_states=True).hidden_states
        expected = []
        for mixer, layer, x in zip(brain.objective.mixers.values(), family.layers(brain.teacher), hidden, strict=False):
            before, slot, *_ = family.open(layer)
            u = before(x)
            arguments = family.layer_arguments(brain.teacher, u, None)
            sums, frames = layer_distances([mixer(u)], [slot(u, **arguments)])
            expected.append(sums / frames)
    counts = brain.objective.count([batch])
    losses = brain.objective(brain.plain, batch, brain.settings.guidance.weights(0), counts)
    assert torch.allclose(losses.slots, torch.cat(expected), rtol=1e-4)
    assert losses.total.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)


@pytest.mark.slow
def test_the_distance_falls_and_is_logged(experiment, start):
    keys = {"guidance": "alignment", "num_steps": 40, "learning_rate": 3e-3, "initialise": "random"}
    brain = start(experiment(**keys))
    lines = [json.loads(line) for line in (brain.store.folder / "train_log.jsonl").read_text().splitlines()]
    first, last = ([line for line in lines if "alignment/00" in line][i] for i in (0, -1))
    for layer in ("alignment/00", "alignment/01"):
        assert last[layer] < 0.7 * first[layer]


def test_kept_layers_are_left_out(experiment):
    brain, dataset = build([str(experiment(**ALIGNED)), "--layer_map", "{overrides: {0: null}}"])
    assert list(brain.objective.mixers) == [1]
    batches = padded(dataset, IN_BATCHES)
    losses = brain.objective(
        brain.plain, batches[0], brain.settings.guidance.weights(0), brain.objective.count(batches)
    )
    assert losses.slots.shape == (1,)


@pytest.mark.slow  # trainings
@pytest.mark.parametrize("killed_after", [2, 7], ids=["during", "after"])
def test_killed_and_resumed_to_the_bit(experiment, start, whole, monkeypatch, killed_after):
    keys = RESTLESS | {"align_steps": 5, "num_steps": 10, "align_learning_rate": 3e-3}
    path, expected = experiment(**keys), whole(**keys).brain
    with monkeypatch.context() as patch:
        kill_after_step(patch, killed_after)
        with pytest.raises(Killed):
            start(path)
    assert_same_run(start(path), expected)


def test_the_schedule_begins_after_it(experiment):
    schedule = "!new:cald_speech.training.schedules.WarmupSchedule {warmup_steps: 2, decay_steps: 4, shape: linear}"
    keys = {"align_steps": 10, "num_steps": 20, "learning_rate": 1.0, "align_learning_rate": 0.5}
    path = experiment(**keys)
    path.write_text(path.read_text() + f"schedule: {schedule}\n")
    brain, _ = build([str(path)])
    rates = [brain.settings.learning_rate_at(step) for step in range(17)]
    assert rates[:2] == [0.5, 0.5] and rates[1:10] == sorted(rates[1:10], reverse=True) and min(rates[:10]) >= 0.05
    assert rates[10:17] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


# --- the same mask for both -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["student", "none"])
def test_the_teacher_hears_what_the_student_hears(experiment, shared):
    keys = {"mask_time_prob": 0.4, "mask_time_length": 3, "mask_feature_prob": 0.2, "mask_feature_length": 4}
    path = experiment(model_overrides=keys, teacher_mask="student" if shared else "none")
    brain, dataset = build([str(path)])
    inputs = {}
    for name, model in (("student", brain.plain), ("teacher", brain.teacher)):
        # What the encoder gets behind the mask; the positional convolution is the first to look at it.
        positions = brain.models.family.front_end(model).positions
        positions.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].detach()}))
    brain.fit_batch(padded(dataset, IN_BATCHES[:1]))
    same = torch.isclose(inputs["student"], inputs["teacher"], atol=1e-5)
    assert same.all() if shared else not same.all()
    assert not any(module.training for module in brain.teacher.modules())
