"""WER against duration, and under stress: does a model that was trained on short utterances read long recordings?

Utterances of a manifest are joined x 1, x 2, x 4, ... with short pauses, and with pauses of 0.5 to 30 s. Every model
reads the same recordings, each as its reader does (`cald_speech.tasks.reading`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cald_speech.conversion import from_pretrained
from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.data.joining import Recording, join_recording, recordings
from cald_speech.data.manifests import read_manifest
from cald_speech.data.text import normalise
from cald_speech.errors import UserError, moved
from cald_speech.families.hub import load_processor
from cald_speech.tasks.reading import READERS, Reader
from cald_speech.tasks.wer import score

Entries = Sequence[Mapping[str, Any]]
Make = Callable[[Entries, int], Iterator[Recording]]
"""(manifest entries, how many recordings) to the recordings; always the same ones."""

BURST_S, BURST_LEVEL = (0.3, 2.0), 0.1  # 20 dB below full scale, about the level of speech
STRESS_UTTERANCES = 8
PAUSE_S = (0.3, 1.0)
PAUSES = {"pauses to 0.5 s": (0.1, 0.5), "pauses to 30 s": (0.5, 30.0)}


def evaluate_by_length(
    sources: Sequence[str],
    manifest: Path,
    *,
    joins: Sequence[int],
    utterances: int,
    readers: Sequence[str] = ("long-form",),
    only: str = "",
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
    only : the conditions whose names have these words in them.

    Raises
    ------
    UserError
        for a manifest or model that cannot be used, or if no condition has the words of ``only``.
    """
    wanted = {name: condition for name, condition in conditions(joins).items() if only in name}
    if not wanted:
        raise UserError(f"only: expected words of one of {', '.join(conditions(joins))}, got {only!r}")
    entries = list(read_manifest(manifest).values())
    heard_by: dict[str, Reader] = {}
    for source in sources:
        model, processor = from_pretrained(source, head="ctc", device=device, new_head=False), load_processor(source)
        heard_by |= {f"{source} ({name})": READERS[name](model, processor) for name in readers}
    rows = []
    for name, condition in tqdm(wanted.items(), unit="condition", disable=not progress):
        made = condition.make(entries, max(1, utterances // condition.joined))
        found = evaluate_condition(heard_by, made, normaliser)
        rows += [{"condition": name, "joined": condition.joined} | row for row in found]
    return rows


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


# --- the recordings


@dataclass(frozen=True)
class Condition:
    """Recordings of one kind, of ``joined`` utterances each."""

    joined: int
    make: Make


def joined(number: int, pause_s: tuple[float, float]) -> Condition:
    """Utterances joined with pauses drawn from ``pause_s``."""
    return Condition(number, lambda entries, count: recordings(entries, number, pause_s, count=count))


def long_silences(entries: Entries, number: int) -> Iterator[Recording]:
    """30 s of low noise between utterances."""
    return recordings(entries, STRESS_UTTERANCES, (30.0, 30.0), count=number)


def noise_bursts(entries: Entries, number: int) -> Iterator[Recording]:
    """A burst of white noise, about as loud as speech, in every pause."""
    generator = torch.Generator().manual_seed(1)
    for recording in recordings(entries, STRESS_UTTERANCES, (2.5, 2.5), count=number):
        samples = recording.samples.clone()
        for start in recording.starts[1:]:
            low, high = BURST_S
            length = int((low + (high - low) * torch.rand((), generator=generator)) * SAMPLE_RATE)
            stop = start - int(0.25 * SAMPLE_RATE)  # it ends a quarter of a second before the next utterance
            samples[stop - length : stop] += BURST_LEVEL * torch.randn(length, generator=generator)
        yield Recording(samples, recording.text, recording.starts)


def one_speaker(entries: Entries, number: int) -> Iterator[Recording]:
    """The same speaker throughout: what `speaker changes` is held against."""
    return _by_speaker(entries, number, changing=False)


def speaker_changes(entries: Entries, number: int) -> Iterator[Recording]:
    """Another speaker with each utterance."""
    return _by_speaker(entries, number, changing=True)


def repetitions(entries: Entries, number: int) -> Iterator[Recording]:
    """The same utterance again and again."""
    generator = torch.Generator().manual_seed(3)
    for place in torch.randperm(len(entries), generator=generator)[:number].tolist():
        yield join_recording([entries[place]] * STRESS_UTTERANCES, PAUSE_S, generator)


def _by_speaker(entries: Entries, number: int, *, changing: bool) -> Iterator[Recording]:
    generator = torch.Generator().manual_seed(2)
    voices: dict[str, list] = {}
    for entry in entries:
        voices.setdefault(entry.get("speaker", ""), []).append(entry)
    names = sorted(voices)
    for turn in range(number):
        # Without changes everything comes from one voice; with them the voices take turns.
        spoken_by = [names[(turn + i * changing) % len(names)] for i in range(STRESS_UTTERANCES)]
        picked = [voices[name][int(torch.randint(len(voices[name]), (), generator=generator))] for name in spoken_by]
        yield join_recording(picked, PAUSE_S, generator)


STRESS: Mapping[str, Condition] = {
    "plain": joined(STRESS_UTTERANCES, PAUSE_S),
    "30 s silences": Condition(STRESS_UTTERANCES, long_silences),
    "noise bursts": Condition(STRESS_UTTERANCES, noise_bursts),
    "one speaker": Condition(STRESS_UTTERANCES, one_speaker),
    "speaker changes": Condition(STRESS_UTTERANCES, speaker_changes),
    "repetitions": Condition(STRESS_UTTERANCES, repetitions),
}


def conditions(joins: Sequence[int]) -> dict[str, Condition]:
    """Every condition by name, in the order of the table."""
    longer = {f"x {n}, {name}": joined(n, pause) for name, pause in PAUSES.items() for n in joins}
    return longer | {f"stress: {name}": condition for name, condition in STRESS.items()}


if __name__ == "__main__":
    moved("cald-speech by-length")
