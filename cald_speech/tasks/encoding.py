"""No task at all: an encoder that follows its teacher on audio or text alone, to be fine-tuned for many tasks later."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor
from transformers import SequenceFeatureExtractor
from transformers.utils import ModelOutput

from cald_speech.data.dataset import labelled_dataset
from cald_speech.data.manifests import read_manifest
from cald_speech.ops import mask_padding
from cald_speech.tasks.base import Task
from cald_speech.tasks.processors import feature_extractor
from cald_speech.tasks.sentences import OfSentences

TEXT = "text"  # the label of every row of a table that has no labels


class Encoding(Task):
    """An encoder without a head: no labels, no loss of its own; measured by how far its output is from the teacher's.

    The metric is the squared distance of the last hidden states as a percentage of the teacher's squared size.

    Example
    -------
    >>> Encoding().score({"a": (1.0, 10.0), "b": (0.0, 10.0)})
    5.0
    """

    head = "base"
    metric = "distance"
    compares = True
    unread = ("normaliser", "unknown_characters")

    def processor(
        self, places: Sequence[str], required: str | None, folder: Path, train: Path, normaliser: str
    ) -> SequenceFeatureExtractor:
        return feature_extractor(places, required)

    def dataset(
        self, manifest: Path, processor: SequenceFeatureExtractor, *, normaliser: str, unknown: str
    ) -> DynamicItemDataset:
        return labelled_dataset(read_manifest(manifest), processor, lambda utterance, text: torch.zeros(1).long())

    def units(self, batch: PaddedBatch) -> Tensor:
        return torch.ones(len(batch.id), dtype=torch.long)

    def outputs(self, output: ModelOutput) -> Tensor:
        return output.last_hidden_state

    def loss(self, outputs: Tensor, lengths: Tensor, batch: PaddedBatch) -> Tensor:
        return outputs.new_zeros((), dtype=torch.float32)

    def results(
        self,
        outputs: Tensor,
        followed: Tensor | None,
        lengths: Tensor,
        batch: PaddedBatch,
        processor: SequenceFeatureExtractor,
    ) -> Sequence[tuple[float, float]]:
        """(squared distance, the teacher's squared size) of each utterance, summed over its frames."""
        sums = [
            mask_padding(v.double(), lengths).square().sum(dim=(1, 2)).tolist()
            for v in (outputs.double() - followed.double(), followed)
        ]
        return list(zip(*sums, strict=True))

    def score(self, results: Mapping[str, tuple[float, float]]) -> float:
        distance, size = (sum(of_kind) for of_kind in zip(*results.values(), strict=True))
        return 100 * distance / size


class TextEncoding(OfSentences, Encoding):
    """The same for an encoder of text: sets are tables whose rows all have the label ``text``.

    Arguments
    ---------
    max_tokens : of an input, special tokens counted. What is longer is cut, and counted in the log.
    """

    places: ClassVar[Mapping[str, int]] = {TEXT: 0}

    def __init__(self, max_tokens: int = 512):
        self.max_tokens = max_tokens
