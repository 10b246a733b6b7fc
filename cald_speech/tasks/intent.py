"""Several labels for an utterance from one head: SLURP's intents, which are a scenario and an action (floor F5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor
from torch.nn import functional as F
from transformers import SequenceFeatureExtractor

from cald_speech.data.manifests import Entry, read_manifest
from cald_speech.errors import UserError, some_of
from cald_speech.tasks.classification import Classification, checked_units
from cald_speech.tasks.processors import feature_extractor

OVER_GROUPS = ("sum", "mean")


class Intent(Classification):
    """One linear classifier with an output for every label of every group; an utterance is right if all groups are.

    Split by group, its rows are one linear head for each group, and all of them see the same mean over the frames:
    the groups share the pooled features and nothing else. A manifest's "text" has one label of each group, in the
    groups' order: "alarm set". ``id2label`` names the outputs ``scenario:alarm``, so that a model folder says what its
    groups are. (transformers' own pipeline takes one softmax over all groups: its order within a group is right, its
    scores are not probabilities.)

    Arguments
    ---------
    groups : two or more names with their labels, or the names alone; the labels are then those of the training
        manifest, sorted.
    over_groups : ``sum`` adds up the groups' cross-entropies; ``mean``, as CALD's code, divides by their number.
    units_per_utterance : as in :class:`Classification`.

    Example
    -------
    >>> task = Intent({"scenario": ["alarm", "music"], "action": ["set", "query"]})
    >>> task.labels
    ['scenario:alarm', 'scenario:music', 'action:set', 'action:query']
    >>> task.score({"a": ("alarm set", "alarm set"), "b": ("alarm set", "alarm query")})
    50.0
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]] | Sequence[str],
        *,
        over_groups: str = "sum",
        units_per_utterance: int | str = 1,
    ):
        self.units_per_utterance = checked_units(units_per_utterance)
        if over_groups not in OVER_GROUPS:
            raise ValueError(f"over_groups: expected {' or '.join(OVER_GROUPS)}, got {over_groups!r}")
        names = list(groups)
        if len(names) < 2 or len(set(names)) < len(names) or any(not name or ":" in name for name in names):
            raise ValueError(f"groups: expected two or more names, each once and without a colon, got {names}")
        self.from_training = not isinstance(groups, Mapping)
        self.groups = LabelGroups(dict.fromkeys(names, ()) if self.from_training else groups)
        self.share = 1 / len(names) if over_groups == "mean" else 1.0
        for name, labels in () if self.from_training else groups.items():
            if len(set(labels)) < max(2, len(labels)) or any(len(x.split()) != 1 for x in labels):
                raise ValueError(
                    f"groups: expected two or more labels of {name}, each once and without spaces, got {list(labels)}"
                )

    @property
    def labels(self) -> list[str]:
        return self.groups.names

    @property
    def places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.labels)}

    def processor(
        self, places: Sequence[str], required: str | None, folder: Path, train: Path, normaliser: str
    ) -> SequenceFeatureExtractor:
        if self.from_training:
            self.groups = groups_in(train, list(self.groups.groups))
        return feature_extractor(places, required)

    def dataset(
        self, manifest: Path, processor: SequenceFeatureExtractor, *, normaliser: str, unknown: str
    ) -> DynamicItemDataset:
        entries = read_manifest(manifest)
        self.groups.check(manifest, entries, "the task")
        return self.items(manifest, entries, processor, lambda utterance, text: torch.tensor(self.groups.places(text)))

    def distributions(self, outputs: Tensor) -> Sequence[Tensor]:
        """The logits of each group: their softmax is taken one by one."""
        return self.groups.split(outputs)

    def loss(self, outputs: Tensor, lengths: Tensor, batch: PaddedBatch) -> Tensor:
        """The groups' cross-entropies, in float32, summed over utterances and summed or averaged over groups.

        ``outputs`` are (B, all labels).
        """
        places = batch.labels.data.to(outputs.device).unbind(1)
        parts = zip(self.groups.split(outputs.float()), places, strict=True)
        return self.share * sum(F.cross_entropy(part, place, reduction="sum") for part, place in parts)

    def results(
        self,
        outputs: Tensor,
        followed: None,
        lengths: Tensor,
        batch: PaddedBatch,
        processor: SequenceFeatureExtractor,
    ) -> Sequence[tuple[str, str]]:
        """(labels, guess) of each utterance, with spaces between the groups' labels."""
        return list(zip(batch.text, self.groups.guesses(outputs), strict=True))


@dataclass(frozen=True)
class LabelGroups:
    """Groups of labels by their names, in the order of a head's outputs: {"scenario": [...], "action": [...]}.

    An utterance's text has one label of each group, in their order, with spaces between. A head with one group is an
    ordinary classifier: its labels may hold spaces, and its group is called "".

    Example
    -------
    >>> groups = LabelGroups.of(["place:hall", "place:attic", "to:on", "to:off"])
    >>> groups.places("attic on"), groups.fault("attic up")
    ([1, 0], 'as to one of on, off')
    """

    groups: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, names: Sequence[str]) -> "LabelGroups":
        """The groups whose :attr:`names` these are, read from a config's id2label.

        Names that do not all say a group, or all say the same one, are the labels of one group.
        """
        groups: dict[str, list[str]] = {}
        for name in names:
            group, _, label = name.partition(":")
            groups.setdefault(group, []).append(label)
        grouped = cls(groups)
        several = len(groups) > 1 and min(map(len, groups.values())) > 1
        return grouped if several and grouped.names == list(names) else cls({"": list(names)})

    @property
    def names(self) -> list[str]:
        """One name for each output of the head: ``group:label``, or the label where there is one group."""
        return [f"{name}:{label}" if name else label for name, labels in self.groups.items() for label in labels]

    def words(self, text: str) -> list[str]:
        """The labels in an utterance's text."""
        return text.split(" ") if len(self.groups) > 1 else [text]

    def fault(self, text: str) -> str:
        """What was expected of a text that is not one label of each group, or nothing."""
        words = self.words(text)
        if len(words) != len(self.groups):
            return f"a label each for {', '.join(self.groups)}, in that order, with spaces between"
        for word, (name, labels) in zip(words, self.groups.items(), strict=True):
            if word not in labels:
                return f"as {name or 'label'} one of {some_of(labels, most=10, separator=', ')}"
        return ""

    def check(self, manifest: Path, entries: Mapping[str, Entry], whose: str) -> None:
        """Raise UserError, naming the first, for utterances whose text has a :meth:`fault`."""
        faults = {utterance: fault for utterance, entry in entries.items() if (fault := self.fault(entry["text"]))}
        if faults:
            utterance, fault = next(iter(faults.items()))
            raise UserError(
                f"{manifest}: utterance {utterance}: expected labels of {whose}, {fault}, got "
                f"{entries[utterance]['text']!r} ({len(faults)} such utterances). Prepare the data again, or "
                "correct the labels in the yaml"
            )

    def places(self, text: str) -> list[int]:
        """The place of each of a text's labels in its group. Raises ValueError for a text with a :meth:`fault`."""
        return [labels.index(word) for word, labels in zip(self.words(text), self.groups.values(), strict=True)]

    def split(self, outputs: Tensor) -> Sequence[Tensor]:
        """The logits (B, labels) of each group, from a head's outputs (B, all labels)."""
        return outputs.split([len(labels) for labels in self.groups.values()], dim=-1)

    def guesses(self, outputs: Tensor) -> list[str]:
        """The text that the outputs (B, all labels) say of each utterance: the likeliest label of each group."""
        places = [part.argmax(-1).tolist() for part in self.split(outputs)]
        of_each = zip(*places, strict=True)
        return [" ".join(labels[i] for i, labels in zip(row, self.groups.values(), strict=True)) for row in of_each]


def groups_in(manifest: Path, names: Sequence[str]) -> LabelGroups:
    """The labels in a manifest's texts, sorted, as groups of these names. Raises UserError where they do not fit."""
    texts = {entry["text"]: utterance for utterance, entry in read_manifest(manifest).items()}
    groups: dict[str, set[str]] = {name: set() for name in names}
    for text, utterance in texts.items():
        words = text.split()
        if len(words) != len(names):
            raise UserError(
                f"{manifest}: utterance {utterance}: expected a label each for {', '.join(names)}, got {text!r}. "
                "Prepare the data again, or correct `groups` of the task in the yaml"
            )
        for word, labels in zip(words, groups.values(), strict=True):
            labels.add(word)
    for name, labels in groups.items():
        if len(labels) < 2:
            raise UserError(
                f"{manifest}: expected two or more labels of {name} to tell apart, got {', '.join(labels)} alone. "
                "Train on more data, or write the labels into `groups` of the task in the yaml"
            )
    return LabelGroups({name: sorted(labels) for name, labels in groups.items()})
