"""A linear recurrence over any number of steps in a fixed number of operations on tensors, for graphs of any length.

``S_t = a_t S_{t-1} + b_t``. Two steps after one another are one, ``(a' a, a' b + b')``; so steps are put together in
groups by doubling, and the groups' own steps are a recurrence again, over fewer steps. A graph of it holds no loop
over time, which would fix the length that it was traced at. Every factor is a product of decays: none is above 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 16  # steps, a power of two: doubling passes over them four times


def recurrence(
    decays: Tensor,
    added: Tensor,
    initial: Tensor,
    *,
    levels: int,
    times: Callable[[Tensor, Tensor], Tensor] = torch.mul,
) -> Tensor:
    """The state after each step.

    Arguments
    ---------
    decays : (B, T, ...), a of each step, which ``times`` can multiply with a state and with one another.
    added : (B, T, ...), b of each step.
    initial : (B, ...), the state before the first.
    levels : of groups in groups; some ``GROUP ** levels`` steps are taken, and half as many certainly.
    times : how a's are multiplied, the later one first: by elements, or ``torch.matmul``.

    Returns
    -------
    (B, T, ...), as added.

    Example
    -------
    >>> half, one = torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)
    >>> recurrence(half, one, torch.zeros(1, 1), levels=1).flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    steps = added.size(1)
    if levels == 1:
        torch._check(steps <= GROUP, lambda: "a recurrence in fixed depth has more steps than its levels take")
    count = 1 if levels == 1 else more_than(steps, GROUP)
    decays, added = (in_groups(v, count, GROUP) for v in (decays, added))
    reach = 1
    while reach < GROUP:
        late, early = decays[:, :, reach:], decays[:, :, :-reach]
        added = torch.cat([added[:, :, :reach], added[:, :, reach:] + times(late, added[:, :, :-reach])], dim=2)
        decays = torch.cat([decays[:, :, :reach], times(late, early)], dim=2)
        reach *= 2
    entering = initial[:, None]
    if levels > 1:
        after = recurrence(decays[:, :, -1], added[:, :, -1], initial, levels=levels - 1, times=times)
        entering = first(torch.cat([entering, after], dim=1), count)
    return first((added + times(decays, entering[:, :, None])).flatten(1, 2), steps)


def more_than(steps: int, size: int) -> int:
    """Groups of ``size`` that hold so many steps: never one, which a tracer would take for a constant.

    Example
    -------
    >>> more_than(1, 16), more_than(17, 16)
    (2, 3)
    """
    return steps // size + 2


def in_groups(v: Tensor, count: int, size: int) -> Tensor:
    """(B, T, ...) to (B, count, size, ...); what fills the last groups comes after all steps.

    Example
    -------
    >>> in_groups(torch.ones(1, 3, 2), count=2, size=2).shape
    torch.Size([1, 2, 2, 2])
    """
    behind = count * size - v.size(1)
    return F.pad(v, (*(0, 0) * (v.dim() - 2), 0, behind)).unflatten(1, (count, size))


def first(v: Tensor, count: int) -> Tensor:
    """(B, T, ...) to its first ``count`` frames.

    Example
    -------
    >>> first(torch.ones(1, 3, 2), 2).shape
    torch.Size([1, 2, 2])
    """
    if not torch.compiler.is_compiling():
        return v[:, :count]
    # A tracer works out what is left of padding, and gives a slice's size up: both of them here depend on the length.
    return F.pad(v, (*(0, 0) * (v.dim() - 2), 0, count - v.size(1)))
