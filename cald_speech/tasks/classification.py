"""One label for an utterance: intent, speaker, language (floor F5)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, SequenceFeatureExtractor

from cald_speech.data.dataset import OUTPUT_KEYS, labelled_dataset
from cald_speech.data.manifests import Entry, read_manifest
from cald_speech.errors import UserError, some_of
from cald_speech.tasks.base import Task
from cald_speech.tasks.processors import feature_extractor

CHARACTERS = "characters"
COUNT = "num_characters"  # of an entry: the characters of its transcript


class Classification(Task):
    """A linear classifier over the mean of the valid frames; measured in the percentage of wrong labels.

    Arguments
    ---------
    labels : the names of the classes, in the order of the head's outputs. A manifest's "text" is the utterance's label.
        None takes those of the training manifest, sorted, as soon as ``processor()`` is called with it.
    units_per_utterance : what an utterance counts for where the loss is divided: a number, or ``characters``, the
        "num_characters" of its entry. CALD's code divides the cross-entropy by the characters of transcripts that
        the task does not read; beside the distillation terms, the task then weighs so much less.

    Example
    -------
    >>> Classification(["yes", "no"]).score({"a": ("yes", "yes"), "b": ("no", "yes")})
    50.0
    """

    head = "classification"
    metric = "error"
    framewise = False
    unread = ("normaliser", "unknown_characters")

    def __init__(self, labels: Sequence[str] | None = None, *, units_per_utterance: int | str = 1):
        self.units_per_utterance = checked_units(units_per_utterance)
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels or ()):
            raise ValueError(f"labels: expected a list of names, numbers among them in quotes, got {labels!r}")
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
        return self.items(manifest, entries, processor, lambda utterance, label: torch.tensor([self.places[label]]))

    def items(
        self,
        manifest: Path,
        entries: Mapping[str, Entry],
        processor: SequenceFeatureExtractor,
        labels: Callable[[str, str], Tensor],
    ) -> DynamicItemDataset:
        """The items of a manifest's entries, with what :meth:`units` needs of them.

        Raises UserError for the first entry without it.
        """
        dataset = labelled_dataset(entries, processor, labels)
        if self.units_per_utterance == CHARACTERS:
            for utterance, entry in entries.items():
                if not isinstance(entry.get(COUNT), int) or entry[COUNT] < 1:
                    raise UserError(
                        f'{manifest}: utterance {utterance}: expected "{COUNT}", a number from 1 on, got '
                        f"{entry.get(COUNT)!r}. Prepare the data again, or set units_per_utterance of the task to 1"
                    )
            dataset.set_output_keys([*OUTPUT_KEYS, COUNT])
        return dataset

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
        if self.units_per_utterance == CHARACTERS:
            return torch.as_tensor(batch[COUNT])
        return torch.full((len(batch.id),), self.units_per_utterance, dtype=torch.long)

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


def checked_units(given: int | str) -> int | str:
    is_count = isinstance(given, int) and not isinstance(given, bool) and given >= 1
    if not is_count and given != CHARACTERS:
        raise ValueError(f"units_per_utterance: expected a number from 1 on, or {CHARACTERS}, got {given!r}")
    return given


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
