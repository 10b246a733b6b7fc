"""Which parameters decay, and the clipping of their gradients."""

from collections.abc import Iterable

import torch
from torch import nn

from cald_speech.mixers import SCAN_PARAMETERS


def parameter_groups(model: nn.Module, weight_decay: float, *, decay: str = "all") -> list[dict]:
    """Trainable parameters in two groups: matrices with weight decay; vectors and the scans' parameters without.

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


def clip_gradients(optimiser: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Clip the joint norm of the gradients of every parameter group; returns the norm before."""
    parameters: Iterable = [p for group in optimiser.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, max_norm)
