"""Teachers that change during the run: trained along (trajectory), or led from checkpoint to checkpoint (waypoint)."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cald_speech.errors import UserError
from cald_speech.training.brain import CaldBrain
from cald_speech.training.models import TeacherTraining
from cald_speech.training.objective import Objective
from tests.training.conftest import starter, writer
from tests.training.miniature import write_model
from tests.training.test_resume import RESTLESS, Killed, assert_same_run, assert_same_state, kill_after_step


@pytest.fixture(scope="module")
def fine_tuned(corpus, teachers, tmp_path_factory) -> Path:
    """The folder of a run of 8 steps that left a waypoint every 2."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    keys = {"source": str(teachers["layer"]), "guidance": "unguided", "num_steps": 8, "waypoint_every_steps": 2}
    return starter(folder)(writer(corpus, teachers, folder)(convert=False, **keys)).store.folder


@pytest.fixture
def moving(fine_tuned, teachers) -> Callable[..., dict]:
    """The keys of an experiment under a teacher that moves."""

    def keys(mode: str, **others) -> dict:
        defaults = {"source": str(teachers["layer"]), "teacher": str(fine_tuned / "model"), "guidance": mode}
        defaults |= {"waypoints": str(fine_tuned / "waypoints"), "teacher_steps": 0.5, "teacher_update_every": 2}
        return defaults | others

    return keys


@pytest.mark.slow  # several trainings
@pytest.mark.parametrize("mode", ["trajectory", "waypoint"])
def test_killed_and_resumed_to_the_bit(moving, experiment, start, whole, monkeypatch, mode):
    keys = moving(mode, num_steps=9, **RESTLESS)
    path, expected = experiment(**keys), whole(**keys).brain
    with monkeypatch.context() as patch:
        kill_after_step(patch, 5)  # between the teacher's steps, and two steps after it came to its second waypoint
        with pytest.raises(Killed):
            start(path)
    resumed = start(path)
    assert_same_run(resumed, expected)
    assert_same_state(resumed.teacher.state_dict(), expected.teacher.state_dict())
    if mode == "trajectory":
        optimisers = [brain.teacher_training.optimizer.state_dict() for brain in (resumed, expected)]
        assert_same_state(*optimisers)


def test_the_trajectory_is_that_of_fine_tuning(moving, experiment, start, fine_tuned):
    """Same start, same batches, an update at each step: the teacher is the one that fine-tuning alone makes."""
    brain = start(experiment(**moving("trajectory", teacher_update_every=1, num_steps=8)))
    assert_same_state(brain.teacher.state_dict(), load_file(fine_tuned / "waypoints/step-0000008/model.safetensors"))
    assert not brain.teacher.training
    assert (brain.store.folder / "teacher" / "model.safetensors").exists()


@pytest.fixture
def teachers_head(monkeypatch) -> list[torch.Tensor]:
    """The weights of the teacher's head after each optimiser step."""
    seen, fit_batch = [], CaldBrain.fit_batch

    def watched(brain, batch):
        loss = fit_batch(brain, batch)
        seen.append(brain.teacher.lm_head.weight.detach().clone())
        return loss

    monkeypatch.setattr(CaldBrain, "fit_batch", watched)
    return seen


def test_the_teacher_trains_at_its_own_steps(moving, experiment, start, teachers_head):
    start(experiment(**moving("trajectory", teacher_update_every=3, num_steps=7)))
    changed = [not torch.equal(a, b) for a, b in pairwise(teachers_head)]
    assert changed == [step % 3 == 0 for step in range(1, 7)]


def test_the_published_codes_order(moving, experiment, start, monkeypatch):
    """The teacher is followed as it was, trains after the last of its steps, and at a learning rate of its own."""
    order, train, run = [], TeacherTraining.step, Objective.__call__

    def trained(self, batches, count, learning_rate, precision):
        order.append(("teacher", learning_rate))
        train(self, batches, count, learning_rate, precision)

    def followed(self, *args):
        order.append(("student", None))
        return run(self, *args)

    monkeypatch.setattr(TeacherTraining, "step", trained)
    monkeypatch.setattr(Objective, "__call__", followed)
    keys = {"teacher_update": "last", "teacher_learning_rate": 0.02, "teacher_update_every": 2}
    brain = start(experiment(**moving("trajectory", num_steps=4, accumulation=1, **keys)))
    rates = [0.02 * brain.settings.schedule(step) for step in (1, 3)]
    assert order == [step for rate in rates for step in (("student", None), ("student", None), ("teacher", rate))]


def test_the_waypoints_are_followed(moving, experiment, start, fine_tuned, teachers_head):
    brain = start(experiment(**moving("waypoint", num_steps=14)))
    files = [fine_tuned / f"waypoints/step-{step:07d}/model.safetensors" for step in (2, 4, 6, 8)]
    weights = [load_file(file)["lm_head.weight"] for file in files]
    followed = [next(i for i, w in enumerate(weights) if torch.equal(w, s)) for s in teachers_head]
    assert followed == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2
    first = json.loads((brain.store.folder / "train_log.jsonl").read_text().splitlines()[0])
    assert first["loss/layers"] > 0


def test_student_and_teacher_of_a_trajectory_start_alike(moving, experiment, start, monkeypatch, tmp_path):
    """From an encoder without a head, both get the same new one."""
    source = write_model(tmp_path / "encoder", head="base")
    monkeypatch.setattr(CaldBrain, "fit", lambda *args, **kwargs: None)
    brain = start(experiment(**moving("trajectory", source=str(source), teacher=None)))
    assert torch.equal(brain.plain.lm_head.weight, brain.teacher.lm_head.weight)


def test_a_trajectory_without_a_source(moving, experiment, start):
    with pytest.raises(UserError, match="give --source"):
        start(experiment(**moving("trajectory", source=None)))


def test_waypoints_of_another_model(moving, experiment, start, fine_tuned, tmp_path):
    waypoints = shutil.copytree(fine_tuned / "waypoints", tmp_path / "waypoints")
    shutil.rmtree(waypoints / "step-0000006")
    write_model(waypoints / "step-0000006", intermediate_size=48)
    with pytest.raises(UserError, match="step-0000006 is of another model than the teacher"):
        start(experiment(**moving("waypoint", waypoints=str(waypoints))))
