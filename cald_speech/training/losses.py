"""The loss terms of a training step, and what is logged of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass
class Counts:
    """Units of one optimiser step, over all its batches and ranks: what the loss sums are divided by."""

    task: float
    frames: float
    batches: float


@dataclass
class Losses:
    """Loss terms of one batch, each a share of the step's mean, so that they add up over batches and ranks."""

    total: Tensor  # the weighted sum of the terms, with gradient
    task: Tensor
    layers: Tensor  # of each compared state; zeros where no teacher is followed
    logits: Tensor
    alignment: Tensor  # of each converted layer; zeros but while the mixers are aligned


def step_values(losses: Sequence[Losses], converted: Sequence[int]) -> dict[str, float]:
    """The terms of a step's batches, summed over them and over the ranks, by the names they have in the log.

    converted : the layers that ``Losses.alignment`` is about.
    """
    names = ("task", "logits", "layers", "alignment")
    terms = [torch.stack([getattr(loss, name) for loss in losses]).sum(0).reshape(-1) for name in names]
    summed = torch.cat(terms).double()
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(summed)
    (task,), (logits,), layers, alignment = (t.tolist() for t in summed.split([len(term) for term in terms]))
    values = {"loss/task": task, "loss/layers": sum(layers) / len(layers), "loss/logits": logits}
    values |= {f"layer_distance/{i:02d}": distance for i, distance in enumerate(layers)}
    if any(alignment):
        values |= {f"alignment/{i:02d}": distance for i, distance in zip(converted, alignment, strict=True)}
    return values
