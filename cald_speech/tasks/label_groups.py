"""Several labels from one head: its outputs are the labels of one group after the other, as one name for each says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cald_speech.data.manifests import Entry
from cald_speech.errors import UserError, some_of


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
