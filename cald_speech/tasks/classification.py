"""One label for an utterance: intent, speaker, language (floor F5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, SequenceFeatureExtractor

from cald_speech.data.dataset import labelled_dataset
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError, some_of
from cald_speech.tasks.base import Task
from cald_speech.tasks.processors import feature_extractor


class Classification(Task):
    """A linear classifier over the mean of the valid frames; measured in the percentage of wrong labels.

    Arguments
    ---------
    labels : the names of the classes, in the order of the head's outputs. A manifest's "text" is the utterance's label.
        None takes those of the training manifest, sorted, as soon as ``processor()`` is called with it.

    Example
    -------
    >>> Classification(["yes", "no"]).score({"a": ("yes", "yes"), "b": ("no", "yes")})
    50.0
    """

    head = "classification"
    metric = "error"
    framewise = False

    def __init__(self, labels: Sequence[str] | None = None):
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError(f"labels: expected two or more names, each once, got {list(labels)}")
        self.from_training = labels is None
        self.places = {label: place for place, label in enumerate(labels or ())}

    @property
    def labels(self) -> list[str]:
        return list(self.places)

    def processor(
        self, places: Sequence[str], required: str | None, folder: Path, train: Path, normaliser: str
    ) -> SequenceFeatureExtractor:
        if self.from_training:
            self.places = {label: place for place, label in enumerate(labels_in(train))}
        return feature_extractor(places, required)

    def dataset(
        self, manifest: Path, processor: SequenceFeatureExtractor, *, normaliser: str, unknown: str
    ) -> DynamicItemDataset:
        entries = read_manifest(manifest)
        strange = {utterance: e["text"] for utterance, e in entries.items() if e["text"] not in self.places}
        if strange:
            utterance, label = next(iter(strange.items()))
            mend = "Train on them too" if self.from_training else "Correct `labels` of the task in the yaml"
            raise UserError(
                f"{manifest}: expected the labels {_shown(self.labels)}, got {label!r} for utterance {utterance} "
                f"({len(strange)} such utterances). {mend}, or prepare the data again"
            )
        return labelled_dataset(entries, processor, lambda utterance, label: torch.tensor([self.places[label]]))

    def head_options(self, start: str, config: PretrainedConfig, processor: SequenceFeatureExtractor) -> dict[str, Any]:
        """A checkpoint that has a classifier must know the same labels."""
        named = [config.id2label[i] for i in sorted(config.id2label)]
        heads = ("ForSequenceClassification", "ForAudioClassification")
        has_head = any(name.endswith(heads) for name in config.architectures or ())
        if has_head and named != self.labels:
            mend = "Train on the same classes" if self.from_training else "Correct `labels` in the yaml"
            raise UserError(
                f"the head of {start!r} tells {_shown(named)} apart, and the task {_shown(self.labels)}: "
                f"expected the same labels in the same order. {mend}, or start from another model"
            )
        return {"id2label": dict(enumerate(self.labels)), "label2id": dict(self.places)}

    def units(self, batch: PaddedBatch) -> Tensor:
        return torch.ones(len(batch.id), dtype=torch.long)

    def loss(self, outputs: Tensor, lengths: Tensor, batch: PaddedBatch) -> Tensor:
        """The summed cross-entropy, in float32, of outputs (B, classes)."""
        return F.cross_entropy(outputs.float(), batch.labels.data[:, 0].to(outputs.device), reduction="sum")

    def results(
        self,
        outputs: Tensor,
        followed: None,
        lengths: Tensor,
        batch: PaddedBatch,
        processor: SequenceFeatureExtractor,
    ) -> Sequence[tuple[str, str]]:
        """(label, guess) of each utterance."""
        names = self.labels
        guesses = (names[place] for place in outputs.argmax(-1).tolist())
        return list(zip(batch.text, guesses, strict=True))

    def score(self, results: Mapping[str, tuple[str, str]]) -> float:
        return 100 * sum(label != guess for label, guess in results.values()) / len(results)


def labels_in(manifest: Path) -> list[str]:
    """The labels of a manifest, sorted. Raises UserError, where there is nothing to tell apart."""
    labels = sorted({entry["text"] for entry in read_manifest(manifest).values()})
    if len(labels) < 2:
        raise UserError(
            f"{manifest}: expected two or more labels to tell apart, got {labels[0]!r} alone. Train on more data, or "
            "write the labels into `labels` of the task in the yaml"
        )
    return labels


def _shown(labels: Sequence[str]) -> str:
    return some_of(labels, most=10, separator=", ")
