"""From items to what a model is called with: how large an item is, which ones make a batch, which batches a step.

A :class:`Modality` knows the size of an item and the arguments of a batch. :class:`StepSampler` groups batches into
optimiser steps, in an order that a resumed run can take up in the middle. SpeechBrain's DynamicBatchSampler makes the
batches. It is told the epoch here, since on one process nobody tells it, and every later epoch would come in the same
order, a resumed one in another.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch, PaddedData
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.data_utils import batch_pad_right
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel

from cald_speech.data.manifests import manifest_hash
from cald_speech.errors import UserError
from cald_speech.families import SpeechFamily, family_of
from cald_speech.ops import valid_frames


class Modality:
    """One kind of input, audio or text.

    ``batch_limit`` is the setting that says how much of it a batch may hold, padding counted.
    """

    batch_limit: str
    size_key: str  # of an entry: how much of the limit it takes
    input_key: str  # of an item: what the model reads

    def sizes(self, dataset: Dataset) -> list[float]:
        """The size of each item of a set, in its order, without making the items."""
        return [entry[self.size_key] for entry in dataset.data.values()]

    def lengths(self, batch: PaddedBatch, model: PreTrainedModel) -> Tensor:
        """(B,) frames or tokens that the model's layers see of each item, on the CPU."""
        raise NotImplementedError

    def arguments(self, batch: PaddedBatch, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
        """What the model is called with, and its :meth:`lengths`; both on the model's device."""
        raise NotImplementedError

    def fingerprint(self, manifest: Path) -> str:
        """What tells a set from every other, wherever its files lie."""
        raise NotImplementedError


class Audio(Modality):
    """Items with ``wav``, (N,) samples at 16 kHz or (N, C) features of them, in sets made of audio manifests.

    Where a model hears windows of one length, an entry's ``window_s`` is its size, whatever its audio has.
    """

    batch_limit = "max_batch_s"
    size_key = "duration_s"
    input_key = "wav"

    def sizes(self, dataset: Dataset) -> list[float]:
        return [entry.get("window_s", entry["duration_s"]) for entry in dataset.data.values()]

    def lengths(self, batch: PaddedBatch, model: PreTrainedModel) -> Tensor:
        return family_of(model, SpeechFamily).frame_lengths(item_lengths(batch.wav), model.config)

    def arguments(self, batch: PaddedBatch, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
        family = family_of(model, SpeechFamily)
        wav, sizes = batch.wav.data.to(model.device), item_lengths(batch.wav).to(model.device)
        return family.inputs(wav, sizes), family.frame_lengths(sizes, model.config)

    def fingerprint(self, manifest: Path) -> str:
        return manifest_hash(manifest)


class Text(Modality):
    """Items with ``tokens``, (N,) ids: sentences of a table (`tables`), or blocks of equal length (`tokens`)."""

    batch_limit = "max_batch_tokens"
    size_key = "num_tokens"
    input_key = "tokens"

    def lengths(self, batch: PaddedBatch, model: PreTrainedModel) -> Tensor:
        return item_lengths(batch.tokens)

    def arguments(self, batch: PaddedBatch, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
        tokens, lengths = batch.tokens.data.to(model.device), item_lengths(batch.tokens).to(model.device)
        valid = valid_frames(lengths, tokens.size(1))
        # RoBERTa counts its positions by which ids are padding, whatever the mask says.
        tokens = tokens.masked_fill(~valid, model.config.pad_token_id or 0)
        options = {"use_cache": False} if family_of(model).causal else {}
        return {"input_ids": tokens, "attention_mask": valid.long(), **options}, lengths


def item_lengths(padded: PaddedData) -> Tensor:
    """(B,) elements of each item, from SpeechBrain's relative lengths.

    Example
    -------
    >>> import torch
    >>> batch = PaddedBatch([{"wav": torch.zeros(7)}, {"wav": torch.zeros(3)}])
    >>> item_lengths(batch.wav).tolist()
    [7, 3]
    """
    return (padded.lengths * padded.data.size(1)).round().long()


def padded(items: Sequence[Mapping[str, Any]]) -> PaddedBatch:
    """The items in a batch, padded on the right; where none has any labels, as texts that nobody wrote, one of padding.

    Example
    -------
    >>> batch = padded([{"id": "a", "labels": torch.zeros(0)}, {"id": "b", "labels": torch.zeros(0)}])
    >>> batch.labels.data.shape, item_lengths(batch.labels).tolist()
    (torch.Size([2, 1]), [0, 0])
    """
    return PaddedBatch(items, padding_func=_pad_right)


def _pad_right(tensors: Sequence[Tensor], **how: Any) -> tuple[Tensor, Tensor]:
    if all(tensor.ndim == 1 and not len(tensor) for tensor in tensors):  # SpeechBrain divides by the longest
        return tensors[0].new_zeros(len(tensors), 1), torch.zeros(len(tensors))
    return batch_pad_right(tensors, **how)


Items = Sequence[Mapping[str, Any]]
BatchChange = Callable[[Items, int], Items]
"""What is made of a training batch's items, with a seed of the batch's own: joined, masked."""


class EpochBatches:
    """The batches that an epoch makes of ``chosen``, indices into ``sizes``: SpeechBrain's, with the epoch told.

    The other arguments are those of :class:`StepSampler`.

    Example
    -------
    >>> EpochBatches([9.0, 1.0, 9.0, 1.0], 2.0, [1, 3]).of(1) in ([[1, 3]], [[3, 1]])
    True
    """

    def __init__(
        self,
        sizes: Sequence[float],
        max_batch: float,
        chosen: Sequence[int],
        *,
        max_items: int | None = None,
        num_buckets: int = 20,
        seed: int = 0,
    ):
        self.chosen = chosen
        sizes = [sizes[i] for i in chosen]
        # Buckets fill batches only in part where sizes are equal, or where it is the number of items that limits them.
        number_limits = max_items is not None and max_items * max(sizes) <= max_batch
        one_bucket = number_limits or min(sizes) == max(sizes)
        self.sampler = DynamicBatchSampler(
            sizes,
            max_batch_length=max_batch,
            num_buckets=None if one_bucket else num_buckets,
            bucket_boundaries=[float(max(sizes))] if one_bucket else [],
            lengths_list=sizes,
            max_batch_ex=max_items,
            seed=seed,
        )

    def of(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, in its order."""
        self.sampler.set_epoch(epoch)
        return [[self.chosen[i] for i in batch] for batch in self.sampler]


class StepSampler(Sampler):
    """Yields one optimiser step at a time: a list of ``accumulation`` batches, each a list of indices.

    Arguments
    ---------
    sizes : of each item: seconds of audio, or tokens.
    max_batch : the sizes' sum in one batch, padding counted.
    accumulation : batches in a step, on each rank. The last step of an epoch may have fewer.
    rank, world_size : every rank gets the same number of batches in each step; of an epoch's last step, up to
        ``world_size - 1`` batches are left out for that (they come in other epochs).
    max_batch_utterances : utterances in one batch, at most.
    num_buckets : utterances of like size are batched together; more buckets, less padding and less shuffling.
    seed : with the epoch, it fixes the order.
    short_first_steps, short_first_size : the first so many steps of a run have items up to this size alone. The epoch
        in which they end ends with them.

    late_from : the run's steps from this one on (0 is the first) are :class:`LateStep`.

    ``start`` is how many steps of the epoch to pass over, ``first`` the number in the run of the one that then comes: a
    run sets both.

    Raises UserError where an epoch has fewer batches than there are ranks, or no item is short.

    Example
    -------
    >>> sampler = StepSampler([1.0, 1.1, 0.9, 1.0], max_batch=2.5, accumulation=2)
    >>> sampler.set_epoch(1)
    >>> sum(len(batch) for step in sampler for batch in step)
    4
    """

    def __init__(
        self,
        sizes: Sequence[float],
        max_batch: float,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        max_batch_utterances: int | None = None,
        num_buckets: int = 20,
        seed: int = 0,
        short_first_steps: int = 0,
        short_first_size: float = math.inf,
        late_from: float = math.inf,
    ):
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        batches = partial(
            EpochBatches, sizes, max_batch, max_items=max_batch_utterances, num_buckets=num_buckets, seed=seed
        )
        self.all = batches(range(len(sizes)))
        self.short, self.short_first_steps = None, short_first_steps
        if short_first_steps:
            chosen = [i for i, size in enumerate(sizes) if size <= short_first_size]
            if not chosen:
                raise UserError(
                    f"short_first_s: expected items of at most {short_first_size:g} to begin with, but the shortest "
                    f"has {min(sizes):g}. Raise it, or set short_first_steps to 0"
                )
            self.short = batches(chosen)
        self.short_epochs: list[int] = []  # the steps of each epoch of short items, from the first on
        self.start, self.first, self.late_from = 0, 0, late_from
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Fix the order of epoch ``epoch``, 1 being a run's first; the same seed and epoch give the same steps."""
        left = self.short_first_steps
        for number in range(1, epoch):
            if left <= 0:
                break
            if len(self.short_epochs) < number:
                self.short_epochs.append(len(self._steps(self.short, number)))
            left -= self.short_epochs[number - 1]
        self.steps = self._steps(self.short, epoch)[:left] if left > 0 else self._steps(self.all, epoch)

    def _steps(self, batches: "EpochBatches", epoch: int) -> list[list[list[int]]]:
        """This rank's steps of an epoch."""
        batches = batches.of(epoch)
        if len(batches) < self.world_size:
            raise UserError(
                f"the training set makes {len(batches)} batch(es), and {self.world_size} processes need one each: give "
                "more data, a smaller max_batch_s, or start fewer processes"
            )
        batches = batches[: len(batches) // self.world_size * self.world_size]
        size = self.accumulation * self.world_size
        whole = [batches[i : i + size] for i in range(0, len(batches), size)]
        return [step[self.rank :: self.world_size] for step in whole]

    def __len__(self) -> int:
        return len(self.steps) - self.start

    def __iter__(self) -> Iterator[list[list[int]]]:
        for number, step in enumerate(self.steps[self.start :], start=self.first):
            yield LateStep(step) if number >= self.late_from else step


class LateStep(list):
    """A step near the end of a run, whose items are changed in a way of their own."""


class StepDataset(Dataset):
    """A dataset indexed by what :class:`StepSampler` yields; an item is the list of the step's padded batches.

    ``change`` makes other items of a batch's items, ``late_change`` those of a :class:`LateStep`.
    """

    def __init__(self, dataset: Dataset, change: BatchChange | None = None, late_change: BatchChange | None = None):
        self.dataset, self.change, self.late_change = dataset, change, late_change

    def __getitem__(self, step: list[list[int]]) -> list[PaddedBatch]:
        change = self.late_change if isinstance(step, LateStep) else self.change
        return [self._batch(indices, change) for indices in step]

    def _batch(self, indices: list[int], change: BatchChange | None) -> PaddedBatch:
        items = [self.dataset[i] for i in indices]
        # The hash of a tuple of integers is the same in every process.
        return padded(items if change is None else change(items, hash(tuple(indices))))


def step_loader(
    dataset: Dataset,
    sampler: StepSampler,
    *,
    change: BatchChange | None = None,
    late_change: BatchChange | None = None,
    num_workers: int = 0,
) -> DataLoader:
    """A loader of optimiser steps: lists of batches, padded on the right."""
    # Its own generator: starting an epoch draws a seed, which must not come out of training's random state.
    return DataLoader(
        StepDataset(dataset, change, late_change),
        batch_size=None,
        sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        generator=torch.Generator(),
    )


def batches_by_length(sizes: Sequence[float], max_batch: float) -> list[list[int]]:
    """Indices into ``sizes``, longest first (memory then runs out at once or never), in batches of at most
    ``max_batch`` (seconds or tokens, as the sizes), padding counted; a longer item is a batch of its own.

    Example
    -------
    >>> batches_by_length([1.0, 5.0, 2.0, 2.0], max_batch=4.0)
    [[1], [2, 3], [0]]
    """
    result: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if result and sizes[result[-1][0]] * (len(result[-1]) + 1) <= max_batch:
            result[-1].append(index)
        else:
            result.append([index])
    return result


def batch_loader(dataset: Dataset, sizes: Sequence[float], max_batch: float) -> DataLoader:
    """A loader of padded batches for validation, always in the same order."""
    batches = batches_by_length(sizes, max_batch)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=padded, generator=torch.Generator())


def _as_it_is(step: list[PaddedBatch]) -> list[PaddedBatch]:
    return step
