"""WER against duration, and under stress: does a model that was trained on short utterances read long recordings?

Utterances of a manifest are joined x 1, x 2, x 4, ... with short pauses, and with pauses of 0.5 to 30 s. Every model
reads the same recordings, each as its reader does (`cald_speech.tasks.reading`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cald_speech.data.joining import Recording
from cald_speech.data.manifests import read_manifest
from cald_speech.data.text import normalise
from cald_speech.errors import moved
from cald_speech.evaluation.conditions import STRESS, Condition
from cald_speech.evaluation.conditions import by_length as joined
from cald_speech.evaluation.forward import load
from cald_speech.longform import load_processor
from cald_speech.tasks.reading import READERS, Reader
from cald_speech.tasks.wer import score

PAUSES = {"pauses to 0.5 s": (0.1, 0.5), "pauses to 30 s": (0.5, 30.0)}


def evaluate_by_length(
    sources: Sequence[str],
    manifest: Path,
    *,
    joins: Sequence[int],
    utterances: int,
    readers: Sequence[str] = ("long-form",),
    normaliser: str = "librispeech",
    device: str = "cpu",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """A row for each condition and reader of each model, with ``utterances`` utterances in every condition.

    Arguments
    ---------
    sources : folders or hub ids of models with a CTC head.
    joins : how many utterances make a recording.
    readers : of `cald_speech.tasks.reading.READERS`: ``whole`` in one forward pass, ``long-form`` the same in bounded
        memory, ``chunks`` cut into overlapping pieces.

    Raises
    ------
    UserError
        for a manifest or model that cannot be used.
    """
    entries = list(read_manifest(manifest).values())
    made: dict[str, Reader] = {}
    for source in sources:
        model, processor = load(source, device, head="ctc"), load_processor(source)
        made |= {f"{source} ({name})": READERS[name](model, processor) for name in readers}
    rows = []
    for name, condition in tqdm(conditions(joins).items(), unit="condition", disable=not progress):
        recordings = condition.make(entries, max(1, utterances // condition.joined))
        found = evaluate_condition(made, recordings, normaliser)
        rows += [{"condition": name, "joined": condition.joined} | row for row in found]
    return rows


def conditions(joins: Sequence[int]) -> dict[str, Condition]:
    """Every condition by name, in the order of the table."""
    longer = {f"x {n}, {name}": joined(n, pause) for name, pause in PAUSES.items() for n in joins}
    return longer | {f"stress: {name}": condition for name, condition in STRESS.items()}


def evaluate_condition(readers: dict[str, Reader], recordings: Iterator[Recording], normaliser: str) -> list[dict]:
    """One row for each reader: WER, insertions and deletions per minute, over the recordings of one condition."""
    references, durations_s = {}, {}
    hypotheses: dict[str, dict[str, str]] = {name: {} for name in readers}
    for number, recording in enumerate(recordings):
        key = f"{number:05d}"
        references[key], durations_s[key] = normalise(recording.text, normaliser), recording.duration_s
        for name, read in readers.items():
            hypotheses[name][key] = normalise(read(recording.samples), normaliser)
    rows, minutes = [], sum(durations_s.values()) / 60
    for name, texts in hypotheses.items():
        result = score(references, texts, durations_s=durations_s)
        low, high = result.interval() or (None, None)
        rows.append({"model": name, "recordings": len(references), "s each": 60 * minutes / len(references)})
        rows[-1] |= {"words": result.words.count, "WER %": result.words.rate, "low": low, "high": high}
        rows[-1] |= {"ins/min": result.words.insertions / minutes, "del/min": result.words.deletions / minutes}
    return rows


if __name__ == "__main__":
    moved("cald-speech by-length")
