"""The mean of a run's last validated models: ``average_checkpoints``, by SpeechBrain's own averaging.

Each is a checkpoint with its optimiser, so that a run which keeps more of them needs that much disk.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.checkpoints import Checkpoint, average_checkpoints
from torch import Tensor

from cald_speech.data.batching import StepSampler
from cald_speech.errors import UserError
from cald_speech.training.settings import Settings
from cald_speech.training.stepwise import StepwiseConversion


def check_average(settings: Settings, sampler: StepSampler, since: int) -> None:
    """Raise UserError where the run will not have so many validated checkpoints of its last model, or has adapters.

    Arguments
    ---------
    since : the optimiser step before which the last layers are converted.
    """
    if settings.adapters is not None:
        raise UserError(
            "average_checkpoints: expected 1 with adapters: the mean of their factors is not that of what they add. "
            "Leave one out"
        )
    wanted, found, step, epoch = settings.average_checkpoints, 0, 0, 0
    while step < settings.num_steps and found < wanted:
        epoch += 1
        sampler.set_epoch(epoch)
        step += len(sampler.steps)
        validated = epoch % settings.validate_every_epochs == 0 or step >= settings.num_steps
        found += validated and step > since
    sampler.set_epoch(0)
    if found < wanted:
        raise UserError(
            f"average_checkpoints: expected at most {found}, since so many validations come in {settings.num_steps} "
            f"steps{' after the last conversion' if since else ''}, got {wanted}. Validate more often "
            "(--validate_every_epochs), or average fewer"
        )


def last_conversion(stepwise: StepwiseConversion | None) -> int:
    """The optimiser step before which the last layers are converted; 0 where all are from the start."""
    return max(stepwise.steps) if stepwise is not None and stepwise.groups else 0


def validated_first(metric: str) -> Any:
    """The order in which checkpoints are kept for an average: those of a validation, the newest before the others."""
    return lambda checkpoint: (metric in checkpoint.meta, checkpoint.meta["unixtime"])


def mean_weights(checkpoints: list[Checkpoint]) -> Mapping[str, Tensor]:
    """The mean of the student's weights in these."""
    return average_checkpoints(checkpoints, "student", parameter_loader=_load)


def _load(path: Path, map_location: str) -> dict[str, Tensor]:
    """Weights that are tied stand under several names in one memory, where they would be summed as often."""
    weights = torch.load(path, map_location=map_location, weights_only=True)
    return {name: weight.clone() for name, weight in weights.items()}
