"""What the processes of one run agree on; a single process agrees with itself."""

from dataclasses import astuple

import torch
from torch import distributed

from cald_speech.training.losses import Counts


def summed(counts: Counts, device: torch.device) -> Counts:
    """The counts of all ranks together."""
    if not distributed.is_initialized():
        return counts
    values = torch.tensor(astuple(counts), dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return Counts(*values.tolist())


def all_ranks(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on every rank."""
    if not distributed.is_initialized():
        return condition
    flag = torch.tensor(float(condition), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MIN)
    return bool(flag)
