"""Forced alignment of whole chapters: how far the words' times are from the borders that the corpus itself has.

The text of a chapter is aligned to its recording in one pass, as if nothing were known of its utterances. Then the
first word of each utterance is held against the first speech in it, the last word against the last, and every word
against where it stands if its utterance is aligned alone.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cald_speech.data.audio import SAMPLE_RATE, read_entry
from cald_speech.data.text import normalise
from cald_speech.longform import AudioSource
from cald_speech.longform.recogniser import Recogniser
from cald_speech.longform.words import Word
from cald_speech.recipes.digits.word_times import speech_extent

# Labels that are looked at in any one frame: all of a chapter's, so that the path is the best one there is. The default
# follows the best partial path, which a model that reads badly leaves at the beginning.
BAND = 10**6
Entries = Mapping[str, Mapping[str, Any]]


def border_errors(
    recogniser: Recogniser, utterances: Entries, normaliser: str = "librispeech"
) -> dict[str, list[float]]:
    """Seconds, positive where the alignment is late: "start" and "end" (utterances,), "alone" (words,); and "own"
    (words,), 1 where a word's middle lies within its utterance.

    Arguments
    ---------
    utterances : of one chapter, in the order of reading; segments of one file.
    """
    texts = [normalise(entry["text"], normaliser) for entry in utterances.values()]
    audio = next(iter(utterances.values()))["audio"]
    words = list(recogniser.align(AudioSource.open(audio), " ".join(texts), band=BAND))
    found: dict[str, list[float]] = {"start": [], "end": [], "alone": [], "own": []}
    place = 0
    for entry, text in zip(utterances.values(), texts, strict=True):
        own, place = words[place : place + len(text.split())], place + len(text.split())
        samples, begin = read_entry(entry), entry["start_s"]
        first, last = (begin + sample / SAMPLE_RATE for sample in speech_extent(samples))
        found["start"].append(own[0].start_s - first)
        found["end"].append(own[-1].end_s - last)
        found["own"] += [float(begin <= _middle(word) <= begin + entry["duration_s"]) for word in own]
        alone = recogniser.align(AudioSource.from_samples(samples), text)
        found["alone"] += [word.start_s - begin - same.start_s for word, same in zip(own, alone, strict=True)]
    return found


def _middle(word: Word) -> float:
    return (word.start_s + word.end_s) / 2


def border_row(model: str, found: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians of the absolute errors, and of the errors (positive: late), in milliseconds.

    Example
    -------
    >>> found = {"start": [0.02, -0.04], "end": [0.0], "alone": [0.0, 0.3, 0.0], "own": [1.0, 1.0, 0.0]}
    >>> row = border_row("student", found)
    >>> row["start ms"], row["start late ms"], row["alone ms"], row["own %"]
    (30.0, -10.0, 0.0, 66.7)
    """
    row = {"model": model, "utterances": len(found["start"]), "words": len(found["own"])}
    for key in ("start", "end", "alone"):
        errors_ms = 1_000 * np.array(found[key])
        row |= {f"{key} ms": round(float(np.median(np.abs(errors_ms))), 1)}
        row |= {f"{key} late ms": round(float(np.median(errors_ms)), 1)}
    return row | {"own %": round(100 * float(np.mean(found["own"])), 1)}
