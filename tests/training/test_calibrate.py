"""`calibrate:` in an experiment: the slots are set before the first step, and nothing else is changed by it."""

import pytest
import torch

from cald_speech.errors import UserError
from tests.training.one_step import build


@pytest.mark.slow  # a training
def test_new_mixers_are_calibrated_on_the_training_set(experiment):
    calibrated, _ = build([str(experiment(calibrate=12))])
    slots = calibrated.models.conversion.slots
    assert [slot.layer for slot in slots] == [0, 1]
    assert all(slot.error[1] <= slot.error[0] for slot in slots) and any(slot.changed != "" for slot in slots)
    plain, _ = build([str(experiment())])
    ours, theirs = calibrated.plain.state_dict(), plain.plain.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed and all(".out_proj." in name for name in changed)
    assert calibrated.plain.training == plain.plain.training


def test_a_student_that_is_converted_already_is_refused(experiment, tmp_path):
    with pytest.raises(UserError, match="calibrate: expected a model that is converted in this run"):
        build([str(experiment(calibrate=12, student="somewhere"))])
