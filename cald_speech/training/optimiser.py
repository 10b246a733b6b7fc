"""How parameters are updated: which of them decay, and one clipped step that is taken only if it is finite."""

import math
from collections.abc import Callable

import torch
from torch import nn

from cald_speech.mixers import SCAN_PARAMETERS
from cald_speech.training.distributed import as_number


def make_optimiser(
    model: nn.Module, learning_rate: float, weight_decay: float, *, decay: str = "all"
) -> torch.optim.AdamW:
    """AdamW over the groups of :func:`parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay, decay=decay), lr=learning_rate)


def parameter_groups(model: nn.Module, weight_decay: float, *, decay: str = "all") -> list[dict]:
    """Trainable parameters in two groups: matrices with weight decay; vectors and the scans' parameters without.

    Arguments
    ---------
    decay : ``mixers`` leaves all matrices but the mixers' without it too.

    Example
    -------
    >>> groups = parameter_groups(nn.Linear(2, 2), 0.1)
    >>> [(group["weight_decay"], len(group["params"])) for group in groups]
    [(0.1, 1), (0.0, 1)]
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keep = parameter.dim() < 2 or name.rsplit(".", 1)[-1] in SCAN_PARAMETERS
            keep = keep or (decay == "mixers" and ".mixer." not in name)
            (plain if keep else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def take_up_parameters(optimiser: torch.optim.Optimizer, groups: list[dict]) -> None:
    """Let the optimiser update these groups, whose parameters may be others than before.

    It keeps what it knows of those that stay, and nothing of those that are gone. The order is that of a new optimiser,
    by which a checkpoint's state finds its parameters.
    """
    for group, new in zip(optimiser.param_groups, groups, strict=True):
        group["params"] = new["params"]
    stays = set(parameters_of(optimiser))
    for parameter in [parameter for parameter in optimiser.state if parameter not in stays]:
        del optimiser.state[parameter]


def parameters_of(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Those of every group."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def set_learning_rate(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    """The same for every group."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate


def step_if_finite(
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_norm: float,
    others: Callable[[], bool] = lambda: True,
) -> tuple[float, bool]:
    """Clip the joint norm of all gradients, take the step if that is finite, and drop the gradients.

    Arguments
    ---------
    max_norm : what the norm is clipped to.
    others : what else must be true for a step, asked for where the norm is finite.

    Returns
    -------
    The norm before clipping, and whether the step was taken.
    """
    scaler.unscale_(optimiser)
    norm = as_number(nn.utils.clip_grad_norm_(parameters_of(optimiser), max_norm))
    taken = math.isfinite(norm) and others()
    if taken:
        scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    return norm, taken
