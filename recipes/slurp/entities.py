"""SLU-F1: how well entities and their words are found, as SLURP scores them (Bastianelli et al., arXiv 2011.13205).

An entity is (type, filler). A type that was found counts as found, and how far its filler is from the true one counts
as a false positive and as a false negative, once by words (edits over the words of the true filler) and once by
characters (edits over those of the longer one). SLU-F1 is the F1 of both counts summed.

A CTC model spells entities out among the words, "WAKE ME AT [TIME NINE AM]": `entities_in` reads them, `plain_words`
what is left for a WER.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jiwer
import numpy as np

Entities = Sequence[tuple[str, str]]
Distance = Callable[[str, str], float]
_ENTITY = re.compile(r"\[(\S+)([^\[\]]*)\]")


def entities_in(text: str) -> list[tuple[str, str]]:
    """The entities of a text that are whole: an opening bracket, a type, words, a closing bracket.

    Example
    -------
    >>> entities_in("WAKE ME AT [TIME NINE AM] ON [DATE")
    [('TIME', 'NINE AM')]
    """
    found = [(kind, " ".join(filler.split())) for kind, filler in _ENTITY.findall(text)]
    return [(kind, filler) for kind, filler in found if filler]


def plain_words(text: str) -> str:
    """A text without brackets and types.

    Example
    -------
    >>> plain_words("WAKE ME AT [TIME NINE AM] ON [DATE")
    'WAKE ME AT NINE AM ON'
    """
    return " ".join(re.sub(r"\[\S*|\]", " ", text).split())


def word_distance(true: str, found: str) -> float:
    """Edits of words for each word of ``true``: a WER, above 1 where much is inserted.

    Example
    -------
    >>> word_distance("skim milk", "a lot of milk")
    1.5
    """
    words = jiwer.process_words(true, found)
    return (words.substitutions + words.insertions + words.deletions) / len(true.split())


def character_distance(true: str, found: str) -> float:
    """Edits of characters for each character of the longer one.

    Example
    -------
    >>> character_distance("milk", "silk")
    0.25
    """
    edits = jiwer.process_characters(true, found)
    return (edits.substitutions + edits.insertions + edits.deletions) / max(len(true), len(found))


def confusion(true: Entities, found: Entities, distance: Distance) -> np.ndarray:
    """(true positives, false positives, false negatives) of one utterance.

    Each found entity takes the nearest true one of its type that is left, in the order in which they were found.
    """
    left, counts = list(true), np.zeros(3)
    for kind, filler in found:
        same = [entity for entity in left if entity[0] == kind]
        if not same:
            counts[1] += 1
            continue
        nearest = min(same, key=lambda entity: distance(entity[1], filler))
        away = distance(nearest[1], filler)
        counts += (1, away, away)
        left.remove(nearest)
    counts[2] += len(left)
    return counts


def slu_f1(pairs: Mapping[str, tuple[Entities, Entities]], *, resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Word-F1, char-F1 and SLU-F1 in percent of {utterance: (true, found)}, and SLU-F1's interval over utterances.

    Example
    -------
    >>> pairs = {"a": ([("size", "small"), ("roast", "dark roast")], [("size", "small"), ("roast", "light roast")])}
    >>> found = slu_f1(pairs | {"b": ([("size", "large")], [])})
    >>> {key: round(found[key], 1) for key in ("word F1 %", "char F1 %", "SLU-F1 %")}
    {'word F1 %': 66.7, 'char F1 %': 67.7, 'SLU-F1 %': 67.2}
    """
    by_word, by_character = (
        np.array([confusion(*pair, distance) for pair in pairs.values()])
        for distance in (word_distance, character_distance)
    )
    both = by_word + by_character
    drawn = both[_draws(len(both), resamples, seed)].sum(1)
    low, high = np.quantile(_f1(drawn), [0.025, 0.975]) if len(both) > 1 else (None, None)
    rates = {"word F1 %": by_word, "char F1 %": by_character, "SLU-F1 %": both}
    found = {name: float(_f1(counts.sum(0))) for name, counts in rates.items()}
    return found | {"low": low and float(low), "high": high and float(high)}


def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def _f1(counts: np.ndarray) -> np.ndarray:
    """Of (..., 3) counts, in percent; 0 where nothing was found and nothing was to find."""
    positives, others = 2 * counts[..., 0], counts[..., 1] + counts[..., 2]
    return 100 * positives / np.maximum(positives + others, 1e-12)
