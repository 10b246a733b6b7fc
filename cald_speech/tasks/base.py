"""A task: from head output to loss, result and metric, and the data and the processor that these need (floor F5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin, SequenceFeatureExtractor
from transformers.utils import ModelOutput

from cald_speech.data.batching import Audio, BatchChange, Modality
from cald_speech.errors import UserError

Processor = ProcessorMixin | SequenceFeatureExtractor | PreTrainedTokenizerBase


class Task:
    """What a head is trained for. ``head`` names the family's model class, ``metric`` the figure that is reported, in
    ``unit``; ``modality`` is what the model reads.

    Losses are sums; the trainer divides them by their ``units`` summed over all ranks and accumulated batches.
    ``compares`` says that results are made of the teacher's output too, ``framewise`` that there is an output (B, T, V)
    for each frame, and not (B, V) for each utterance.
    """

    head: str
    metric: str
    unit = " %"
    modality: Modality = Audio()
    blank: int | None = None  # the id of the label that says nothing, where there is one
    compares = False
    framewise = True
    unread: Sequence[str] = ()  # settings of texts that it has no use for

    # --- data and processor -----------------------------------------------------------------------------------------

    def processor(
        self, places: Sequence[str], required: str | None, folder: Path, train: Path, normaliser: str
    ) -> Processor:
        """``required``'s if it is given, else that of the first of ``places`` that has one, or a new one in ``folder``.

        train : the manifest of the training set, of which a vocabulary may be made.
        """
        raise NotImplementedError(f"{type(self).__name__} has no processor()")

    def dataset(self, manifest: Path, processor: Processor, *, normaliser: str, unknown: str) -> Dataset:
        """The items of a manifest: ``id``, what the modality needs (``wav`` or ``tokens``), and what the task needs."""
        raise NotImplementedError(f"{type(self).__name__} has no dataset()")

    def change(self, processor: Processor, *, join_utterances: int, pause_s: float) -> BatchChange | None:
        """What is made of a training batch's items before they are padded; None leaves them as they are.

        Raises UserError for utterances to be joined where a joined one has no label.
        """
        if join_utterances > 1:
            raise UserError(
                f"join_utterances: expected 1, since {type(self).__name__} has no label for several utterances in one, "
                f"got {join_utterances}. Leave it out"
            )
        return None

    def head_options(self, start: str, config: PretrainedConfig, processor: Processor) -> dict[str, Any]:
        """What the config of ``start`` needs for a head that fits the processor. Raises UserError where none can."""
        return {}

    # --- loss -------------------------------------------------------------------------------------------------------

    def units(self, batch: PaddedBatch) -> Tensor:
        """(B,) units (characters, utterances) of each utterance, which the loss sums over."""
        raise NotImplementedError(f"{type(self).__name__} has no units()")

    def can_learn(self, batch: PaddedBatch, lengths: Tensor) -> Tensor:
        """(B,) whether each utterance has a finite loss, whatever the model says in its ``lengths`` (B,) frames."""
        return torch.ones_like(lengths, dtype=torch.bool)

    def outputs(self, output: ModelOutput) -> Tensor:
        """What loss and results are made of: the head's logits."""
        return output.logits

    def distributions(self, outputs: Tensor) -> Sequence[Tensor]:
        """The outputs as logits of one or more distributions, for following the teacher's."""
        return [outputs]

    def loss(self, outputs: Tensor, lengths: Tensor, batch: PaddedBatch) -> Tensor:
        """The loss summed over the batch, a float32 scalar, from outputs and (B,) valid frames."""
        raise NotImplementedError(f"{type(self).__name__} has no loss()")

    # --- results ----------------------------------------------------------------------------------------------------

    def results(
        self, outputs: Tensor, followed: Tensor | None, lengths: Tensor, batch: PaddedBatch, processor: Processor
    ) -> Sequence[Any]:
        """What :meth:`score` needs of each utterance of the batch; ``followed`` are the teacher's outputs."""
        raise NotImplementedError(f"{type(self).__name__} has no results()")

    def score(self, results: Mapping[str, Any]) -> float:
        """The metric, lower is better, from the results of all utterances by their ids."""
        raise NotImplementedError(f"{type(self).__name__} has no score()")
