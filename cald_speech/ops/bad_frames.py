"""Frames that are NaN, infinite or too large, kept from those before them in the order of a scan in chunks.

Within a chunk a frame's weight for the frames before it is zero, and zero times NaN is NaN. So where a frame is bad, a
backend scans once more without the bad ones, and what came before them is taken from there.
"""

import math

import torch
from torch import Tensor


def all_finite(*tensors: Tensor) -> bool:
    """Whether their sums are, which they are but for an accident; waits for the device, where that is not the CPU.

    Example
    -------
    >>> all_finite(torch.ones(3), torch.tensor([1.0, torch.inf]))
    False
    """
    sums = (v.detach().sum(dtype=torch.promote_types(v.dtype, torch.float32)) for v in tensors)
    return math.isfinite(sum(sums).item())


def without(v: Tensor, bad: Tensor) -> Tensor:
    """Zeros where ``bad``; as a copy that lies in the same order, since products of another would round otherwise.

    Example
    -------
    >>> without(torch.tensor([1.0, torch.nan]), torch.tensor([False, True])).tolist()
    [1.0, 0.0]
    """
    return v.clone().masked_fill_(bad, 0)


def write_before(y: Tensor, bad: Tensor, unspoilt: Tensor, *, reverse: bool) -> None:
    """``unspoilt`` into y (B, T, ...) at the frames before the first bad one, of what has one and of nothing else.

    Example
    -------
    >>> y, bad = torch.full((1, 4), torch.nan), torch.tensor([[False, False, True, False]])
    >>> write_before(y, bad, torch.ones(1, 4), reverse=False)
    >>> y.tolist()
    [[1.0, 1.0, nan, nan]]
    """
    spoilt = bad.flip(1).cummax(1).values.flip(1) if reverse else bad.cummax(1).values
    y.copy_(torch.where(spoilt | ~bad.any(1, keepdim=True), y, unspoilt))
