"""One gradient, however a step is cut into batches and processes; and what gets none."""

import json
import os
import subprocess

import pytest
import torch

from cald_speech import from_pretrained
from tests.forking import forking_python
from tests.helpers import relative_error, worst_gradient
from tests.training.miniature import ROOT
from tests.training.one_step import IN_BATCHES, JOINED, build, padded, step_gradients

# Stricter than the table's "gradient", and in float64: in float32 the rounding of sums over all frames, whose order is
# another on another processor, comes near it.
EXACT, EXACTLY = 1e-5, torch.float64


@pytest.fixture
def built(experiment, teachers):
    def make(norm: str = "layer", dtype: torch.dtype = torch.float32, **keys):
        path = experiment(**{"teacher": str(teachers[norm]), "freeze_front_end": False} | keys)
        return build([str(path)], dtype)

    return make


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("guidance", ["target", "unguided"])
def test_accumulated_equals_joined(built, norm, guidance):
    brain, dataset = built(norm, EXACTLY, guidance=guidance)
    joined = step_gradients(brain, padded(dataset, JOINED, EXACTLY))
    brain.optimizer_step = 0
    apart = step_gradients(brain, padded(dataset, IN_BATCHES, EXACTLY))
    error, name = worst_gradient(apart, joined)
    assert error < EXACT, name
    assert set(joined) == {name for name, _ in brain.plain.named_parameters()}


@pytest.mark.parametrize("alphas", [(15.0, 0.0), (0.0, 1.0)], ids=["layers", "logits"])
def test_every_loss_term_reaches_the_student(built, alphas):
    brain, dataset = built(alpha_layer=alphas[0], alpha_logits=alphas[1])
    guided = step_gradients(brain, padded(dataset, IN_BATCHES))
    plain, _ = built(guidance="unguided")
    assert worst_gradient(guided, step_gradients(plain, padded(dataset, IN_BATCHES)))[0] > 0.01


@pytest.fixture(scope="module")
def forking():
    """A Python for torchrun and for its ranks: importing the libraries takes each of them seconds."""
    with forking_python(["torch.distributed.run", "cald_speech.training.run"]) as python:
        yield python


TORCHRUN = "from torch.distributed.run import main; main()"
RANK = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.training.one_step import main; main(*sys.argv[1:])"


@pytest.mark.slow  # torchrun and two ranks
@pytest.mark.parametrize(
    ("converted_at", "shards"),
    [((), ["False", "True"]), pytest.param((0, 1), ["False"], marks=pytest.mark.wide)],
    ids=["at once", "stepwise"],
)
def test_two_ranks_equal_one_process(built, experiment, tmp_path, forking, converted_at, shards):
    """By DistributedDataParallel, and where each holds a part (FSDP2)."""
    path = experiment(freeze_front_end=False, converted_at=converted_at)
    out = tmp_path / "ranks"
    command = [forking, "-c", TORCHRUN, "--standalone", "--nproc_per_node=2", "--no-python"]
    command += [forking, "-c", RANK, path, out, *shards]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as launcher:
        try:
            _, errors = launcher.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            launcher.kill()
            raise
    assert launcher.returncode == 0, errors
    brain, dataset = build([str(path), "--output_folder", str(tmp_path / "one")], EXACTLY)
    expected = step_gradients(brain, padded(dataset, JOINED, EXACTLY))
    for folder in (out / shard for shard in shards):
        found = torch.load(folder / "found.pt")
        error, name = worst_gradient(found["gradients"], expected)
        assert error < EXACT, (folder.name, name)
        # Trained and resumed: both ranks hold the same weights, and each step was logged once.
        one, other = found["weights"]
        assert all(torch.equal(one[name], other[name]) for name in one)
        lines = [json.loads(line) for line in (folder / "run" / "train_log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss/task" in line] == [0, 1, 2]
        # What was written is whole: one process reads it.
        (checkpoint,) = folder.glob("run/checkpoints/CKPT+*/student.ckpt")
        kept, model = torch.load(checkpoint), from_pretrained(folder / "run" / "model").state_dict()
        assert kept.keys() == one.keys() == model.keys()
        assert all(torch.equal(kept[name], one[name]) for name in one)
        assert all(model[name].shape == one[name].shape for name in one)


def test_clipping_reaches_every_group(built, monkeypatch):
    brain, dataset = built(max_grad_norm=0.25)
    norms, step = [], brain.optimizer.step

    def watched(*args, **kwargs):
        groups = [[p.grad for p in group["params"] if p.grad is not None] for group in brain.optimizer.param_groups]
        norms.extend(torch.nn.utils.get_total_norm(group).item() for group in groups)
        return step(*args, **kwargs)

    monkeypatch.setattr(brain.optimizer, "step", watched)
    before = torch.nn.utils.get_total_norm(list(step_gradients(brain, padded(dataset, IN_BATCHES)).values())).item()
    del brain._update
    brain.fit_batch(padded(dataset, IN_BATCHES))
    assert len(norms) == 2 and min(norms) > 0 and before > 1
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(0.25, rel=1e-4)


def test_the_teacher_is_left_alone(experiment, start, teachers):
    # A teacher with dropout in its config: it would show in train mode.
    brain = start(experiment(model_overrides={"hidden_dropout": 0.5}, num_steps=8))
    assert brain.plain.training is False and brain.optimizer_step == 8  # validation came last
    teacher = brain.teacher
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    before = teacher.from_pretrained(teachers["layer"]).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_stays_in_eval_mode_while_the_student_trains(built):
    brain, dataset = built(model_overrides={"hidden_dropout": 0.5})
    modes = []
    brain.teacher.register_forward_hook(lambda module, *_: modes.append((module.training, brain.plain.training)))
    step_gradients(brain, padded(dataset, IN_BATCHES))
    assert set(modes) == {(False, True)}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_front_end(experiment, start, teachers, frozen):
    brain = start(experiment(freeze_front_end=frozen))
    before = brain.teacher.base_model.feature_extractor.state_dict()
    after = brain.plain.base_model.feature_extractor.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) is frozen
    projection = brain.plain.base_model.feature_projection.projection.weight
    assert not torch.equal(projection, brain.teacher.base_model.feature_projection.projection.weight)


def test_gradient_checkpointing_changes_nothing_but_memory(experiment, start):
    """Slots run twice, the second time in the backward pass: their lengths must still be there."""
    plain, saving = (
        start(experiment(gradient_checkpointing=on, accumulation=2), str(on)).plain.state_dict() for on in (False, True)
    )
    assert all(relative_error(saving[name], value) <= 1e-5 for name, value in plain.items())
