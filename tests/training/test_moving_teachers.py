"""Teachers that change during the run: trained along (trajectory), or led from checkpoint to checkpoint (waypoint)."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from cald_speech.errors import UserError
from cald_speech.training.brain import CaldBrain
from tests.training.miniature import write_model
from tests.training.test_resume import RESTLESS, Killed, assert_same_run, assert_same_state, kill_after_step


@pytest.fixture
def fine_tuned(experiment, start, teachers):
    """A run of 8 steps that left a waypoint every 2."""
    keys = {"source": str(teachers["layer"]), "guidance": "unguided", "num_steps": 8, "waypoint_every_steps": 2}
    return start(experiment("fine_tune", convert=False, **keys), "fine_tuned").store.folder


@pytest.fixture
def moving(experiment, fine_tuned, teachers):
    def write(mode: str, **keys):
        defaults = {"source": str(teachers["layer"]), "teacher": str(fine_tuned / "model"), "guidance": mode}
        defaults |= {"waypoints": str(fine_tuned / "waypoints"), "teacher_steps": 0.5, "teacher_update_every": 2}
        return experiment(**defaults | {"num_steps": 15} | keys)

    return write


@pytest.mark.parametrize("mode", ["trajectory", "waypoint"])
def test_killed_and_resumed_to_the_bit(moving, start, monkeypatch, mode):
    path = moving(mode, **RESTLESS)
    expected = start(path, "whole")
    with monkeypatch.context() as patch:
        kill_after_step(patch, 11)
        with pytest.raises(Killed):
            start(path, "killed")
    resumed = start(path, "killed")
    assert_same_run(resumed, expected)
    assert_same_state(resumed.teacher.state_dict(), expected.teacher.state_dict())
    if mode == "trajectory":
        optimisers = [brain.teacher_training.optimizer.state_dict() for brain in (resumed, expected)]
        assert_same_state(*optimisers)


def test_the_trajectory_is_that_of_fine_tuning(moving, start, fine_tuned, monkeypatch):
    """Same start, same batches, an update at each step: the teacher is the one that fine-tuning alone makes."""
    brain = start(moving("trajectory", teacher_update_every=1, num_steps=8))
    assert_same_state(brain.teacher.state_dict(), load_file(fine_tuned / "waypoints/step-0000008/model.safetensors"))
    assert not brain.teacher.training
    assert (brain.store.folder / "teacher" / "model.safetensors").exists()


def test_the_teacher_trains_at_its_own_steps(moving, start, monkeypatch):
    weights, fit_batch = [], CaldBrain.fit_batch

    def watched(brain, batch):
        loss = fit_batch(brain, batch)
        weights.append(brain.teacher.lm_head.weight.detach().clone())
        return loss

    monkeypatch.setattr(CaldBrain, "fit_batch", watched)
    start(moving("trajectory", teacher_update_every=3, num_steps=7))
    changed = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert changed == [step % 3 == 0 for step in range(1, 7)]


def test_the_waypoints_are_followed(moving, start, fine_tuned, monkeypatch):
    seen, fit_batch = [], CaldBrain.fit_batch

    def watched(brain, batch):
        loss = fit_batch(brain, batch)
        seen.append(brain.teacher.lm_head.weight.detach().clone())
        return loss

    monkeypatch.setattr(CaldBrain, "fit_batch", watched)
    start(moving("waypoint", num_steps=14))
    files = [fine_tuned / f"waypoints/step-{step:07d}/model.safetensors" for step in (2, 4, 6, 8)]
    weights = [load_file(file)["lm_head.weight"] for file in files]
    followed = [next(i for i, w in enumerate(weights) if torch.equal(w, s)) for s in seen]
    assert followed == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2


def test_student_and_teacher_of_a_trajectory_start_alike(moving, start, monkeypatch, tmp_path):
    """From an encoder without a head, both get the same new one."""
    source = write_model(tmp_path / "encoder", head="base")
    monkeypatch.setattr(CaldBrain, "fit", lambda *args, **kwargs: None)
    brain = start(moving("trajectory", source=str(source), teacher=None))
    assert torch.equal(brain.plain.lm_head.weight, brain.teacher.lm_head.weight)


def test_a_trajectory_without_a_source(moving, start):
    with pytest.raises(UserError, match="give --source"):
        start(moving("trajectory", source=None))


def test_waypoints_of_another_model(moving, start, fine_tuned, tmp_path):
    other = write_model(tmp_path / "other" / "step-0000002", intermediate_size=48)
    shutil.rmtree(fine_tuned / "waypoints" / "step-0000006")
    shutil.copytree(other, fine_tuned / "waypoints" / "step-0000006")
    with pytest.raises(UserError, match="step-0000006 is of another model than the teacher"):
        start(moving("waypoint"))


def test_the_log_says_what_was_followed(moving, start):
    brain = start(moving("waypoint", num_steps=4))
    first = json.loads((brain.store.folder / "train_log.jsonl").read_text().splitlines()[0])
    assert first["loss/layers"] > 0
