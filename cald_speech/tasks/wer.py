"""Word and character error rates with every count behind them, of a corpus and of each utterance (jiwer 4).

A rate is 100 * (substitutions + insertions + deletions) / (hits + substitutions + deletions), the counts summed over
the corpus before the division. Runs of white space count as one space, which is one character of the CER; texts are
compared in Unicode's composed form (NFC).
"""

import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
from numpy.typing import NDArray

from cald_speech.tasks.bootstrap import bootstrap_interval, paired_bootstrap

_SIGNS = {"equal": "=", "substitute": "S", "insert": "I", "delete": "D"}


@dataclass(frozen=True)
class Score:
    """Counts of words or characters; scores add up.

    Example
    -------
    >>> score = Score(hits=7, substitutions=2, insertions=1, deletions=1) + Score()
    >>> score.count, score.errors, score.rate
    (10, 4, 40.0)
    """

    hits: int = 0
    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0

    @property
    def count(self) -> int:
        """Words or characters of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float | None:
        """Errors per 100 of the reference (above 100 where much is inserted); None where the reference is empty."""
        return 100 * self.errors / self.count if self.count else None

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
        )


@dataclass(frozen=True)
class Utterance:
    """One utterance and its edits. `alignment` lists [sign, reference word, hypothesis word], the sign being "=", "S",
    "I" or "D"; an inserted word has None as its reference, a deleted one None as its hypothesis."""

    id: str
    reference: str
    hypothesis: str
    words: Score
    characters: Score
    alignment: list[list[str | None]]
    duration_s: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Every utterance in the order of the ids, and the corpus: `words.rate` is the WER, `characters.rate` the CER."""

    utterances: list[Utterance]

    @property
    def words(self) -> Score:
        return sum((utterance.words for utterance in self.utterances), Score())

    @property
    def characters(self) -> Score:
        return sum((utterance.characters for utterance in self.utterances), Score())

    @property
    def word_errors(self) -> NDArray[np.int64]:
        """(U,) word edits of each utterance."""
        return np.array([utterance.words.errors for utterance in self.utterances], dtype=np.int64)

    @property
    def word_counts(self) -> NDArray[np.int64]:
        """(U,) reference words of each utterance."""
        return np.array([utterance.words.count for utterance in self.utterances], dtype=np.int64)

    def interval(self, *, groups: Sequence[Hashable] | None = None, **options) -> tuple[float, float] | None:
        """The interval of the WER in percent; None where `bootstrap_interval` needs more (one utterance, no word)."""
        if not self.words.count or len(set(groups or range(len(self.utterances)))) < 2:
            return None
        return bootstrap_interval(self.word_errors, self.word_counts, groups=groups, **options)


def score(
    references: Mapping[str, str], hypotheses: Mapping[str, str], *, durations_s: Mapping[str, float] | None = None
) -> EvaluationResult:
    """Compare {id: text} with {id: text}; both must already be written in one way (case, punctuation).

    An empty reference counts what was inserted; an empty hypothesis counts deletions.

    Raises
    ------
    ValueError
        where an id has no hypothesis or no reference (or no duration): nothing is ever skipped.

    Example
    -------
    >>> result = score({"a": "the cat sat", "b": ""}, {"a": "the cap sat", "b": "uh"})
    >>> result.words
    Score(hits=2, substitutions=1, insertions=1, deletions=0)
    >>> round(result.words.rate, 1), result.utterances[1].words.rate
    (66.7, None)
    >>> result.utterances[0].alignment
    [['=', 'the', 'the'], ['S', 'cat', 'cap'], ['=', 'sat', 'sat']]
    """
    _check_ids(references, hypotheses, "hypothesis")
    if durations_s is not None:
        _check_ids(references, durations_s, "duration")
    utterances = []
    for key in sorted(references):
        reference, hypothesis = (_uniform(texts[key]) for texts in (references, hypotheses))
        words = jiwer.process_words(reference, hypothesis)
        characters = jiwer.process_characters(reference, hypothesis)
        duration_s = None if durations_s is None else float(durations_s[key])
        scores = _counts(words), _counts(characters)
        utterances.append(Utterance(key, reference, hypothesis, *scores, _alignment(words), duration_s))
    return EvaluationResult(utterances)


def _uniform(text: str) -> str:
    """White space made single, and letters composed: a letter and its accent are one character, however written."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def compare(
    a: EvaluationResult, b: EvaluationResult, *, groups: Sequence[Hashable] | None = None, **options
) -> tuple[float, float, float]:
    """(difference, low, high) in points of WER, a minus b, by `paired_bootstrap` over the utterances of both.

    Raises
    ------
    ValueError
        where the two did not score the same references.

    Example
    -------
    >>> references = {"a": "one two", "b": "three"}
    >>> worse = score(references, {"a": "one", "b": "tree"})
    >>> round(compare(worse, score(references, references), resamples=100)[0], 1)
    66.7
    """
    pairs = zip(a.utterances, b.utterances, strict=False)
    same = all((left.id, left.reference) == (right.id, right.reference) for left, right in pairs)
    if len(a.utterances) != len(b.utterances) or not same:
        raise ValueError("a paired comparison needs two results of the same utterances with the same references")
    return paired_bootstrap(a.word_errors, b.word_errors, a.word_counts, groups=groups, **options)


def _check_ids(references: Mapping[str, str], others: Mapping, noun: str) -> None:
    missing, extra = sorted(references.keys() - others.keys()), sorted(others.keys() - references.keys())
    if missing or extra:
        raise ValueError(
            f"expected one {noun} for each reference; {len(missing)} missing {missing[:5]}, "
            f"{len(extra)} extra {extra[:5]}"
        )


def _counts(output: jiwer.WordOutput | jiwer.CharacterOutput) -> Score:
    return Score(output.hits, output.substitutions, output.insertions, output.deletions)


def _alignment(output: jiwer.WordOutput) -> list[list[str | None]]:
    reference, hypothesis = output.references[0], output.hypotheses[0]
    rows: list[list[str | None]] = []
    for chunk in output.alignments[0]:
        left = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        right = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        # Equal and replaced chunks are as long on both sides; an inserted or deleted one has an empty side.
        for place in range(max(len(left), len(right))):
            words = left[place] if left else None, right[place] if right else None
            rows.append([_SIGNS[chunk.type], *words])
    return rows
