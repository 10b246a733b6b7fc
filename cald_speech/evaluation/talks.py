"""WER over whole talks: each recording is read in one pass, and scored where its manifest has segments.

A talk's reference are the texts of its segments, in the order of time. What the model says elsewhere, over applause or
what nobody transcribed, is not scored: a word counts where its middle lies within a segment.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import cald_speech
from cald_speech.conversion.model_card import add_result
from cald_speech.data.audio import audio_info
from cald_speech.data.manifests import Entry, manifest_hash, read_manifest
from cald_speech.data.text import normalise
from cald_speech.errors import UserError
from cald_speech.evaluation.report import run_facts, write_report
from cald_speech.longform import AudioSource, transcribe
from cald_speech.longform.words import Word
from cald_speech.tasks.reading import load_processor
from cald_speech.tasks.wer import score


def evaluate_talks(
    source: str | Path,
    manifest: str | Path,
    output_folder: str | Path,
    *,
    split: str,
    normaliser: str = "librispeech",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> dict[str, Any]:
    """Evaluate a model folder (or hub id) on the recordings of a manifest of segments; report, and update its card.

    Returns the report's summary, which has the number of words outside of the segments too. The arguments are those of
    `evaluate_folder`, decoding is greedy, memory is bounded; `force` runs models whose every layer kept attention.

    Raises: UserError, for whatever is wrong with the folder, the manifest, the audio, the device or the disk.
    """
    model = cald_speech.from_pretrained(source, dtype=dtype).eval()
    options = {"processor": load_processor(source), "device": device, "dtype": dtype, "force": force}
    talks: dict[str, list[Entry]] = {}
    for entry in read_manifest(manifest).values():
        talks.setdefault(entry["audio"], []).append(entry)
    names = {path: Path(path).stem for path in talks}
    if len(set(names.values())) < len(names):
        names = {path: path for path in talks}
    references, hypotheses, durations_s, outside, start = {}, {}, {}, 0, perf_counter()
    for path, entries in talks.items():
        audio_info(path)  # long form reads what there is of a damaged file; here it is whole or an error
        audio = AudioSource.open(path)
        words = list(transcribe(model, audio, **options))
        if audio.fault is not None:
            raise UserError(f"{path}: only the first {audio.fault.time_s:.2f} s can be read: {audio.fault.message}")
        entries = sorted(entries, key=lambda entry: entry.get("start_s", 0.0))
        inside = words_within(words, [_extent(entry) for entry in entries])
        references[names[path]] = normalise(" ".join(entry["text"] for entry in entries), normaliser)
        hypotheses[names[path]] = normalise(" ".join(word.text for word in inside), normaliser)
        durations_s[names[path]] = audio.duration_s
        outside += len(words) - len(inside)
    summary = write_report(
        output_folder,
        score(references, hypotheses, durations_s=durations_s),
        manifest_hash=manifest_hash(manifest),
        normaliser=normaliser,
        model=str(source),
        decoder="greedy, whole recordings",
        split=split,
        extra={"words_outside": outside, **run_facts(model, device, dtype, perf_counter() - start)},
    )
    add_result(Path(source), split, summary)
    return summary


def words_within(words: Iterable[Word], segments: Sequence[tuple[float, float]]) -> list[Word]:
    """The words whose middle lies within one of the ``segments``, (start, end) in seconds; they may overlap.

    Example
    -------
    >>> said = [Word("yes", 1.0, 1.4, 1.0, ()), Word("uh", 2.0, 2.2, 1.0, ()), Word("no", 2.9, 3.3, 1.0, ())]
    >>> [word.text for word in words_within(said, [(3.0, 5.0), (0.5, 2.0)])]
    ['yes', 'no']
    """
    merged: list[list[float]] = []
    for start_s, end_s in sorted(segments):
        if merged and start_s <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end_s)
        else:
            merged.append([start_s, end_s])
    starts = [start_s for start_s, _ in merged]

    def is_inside(word: Word) -> bool:
        middle_s = (word.start_s + word.end_s) / 2
        place = bisect_right(starts, middle_s) - 1
        return place >= 0 and middle_s <= merged[place][1]

    return [word for word in words if is_inside(word)]


def _extent(entry: Entry) -> tuple[float, float]:
    start_s = entry.get("start_s", 0.0)
    return start_s, start_s + entry["duration_s"]
