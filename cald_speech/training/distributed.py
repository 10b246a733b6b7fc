"""What the processes of one run share and agree on; a single process agrees with itself."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from speechbrain.utils.distributed import ddp_init_group
from speechbrain.utils.run_opts import RunOptions
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor


def join(run_opts: RunOptions) -> None:
    """Join the other processes, where torchrun started this one."""
    if "RANK" in os.environ and not distributed.is_initialized():
        ddp_init_group(run_opts)


def leave() -> None:
    """The end of what :func:`join` began."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this process writes: the only one, or rank 0."""
    return rank() == 0


def rank() -> int:
    """The number of this process, as torchrun gave it; 0 for the only one."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def lowest(values: Tensor) -> Tensor:
    """The least of each over all ranks, in place."""
    if world_size() > 1:
        distributed.all_reduce(values, distributed.ReduceOp.MIN)
    return values


def gathered(value: Any) -> list:
    """What every rank has, by rank."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def all_ranks(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on every rank."""
    return bool(lowest(torch.tensor(float(condition), device=device)))


def as_number(value: Tensor) -> float:
    """A tensor of one number, of which each rank may hold a part."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()


def own_part(value: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the ranks, of losses that are each rank's share of one sum; a rank without one adds zeros."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
