"""What a recognizer meets beyond its training utterances: long recordings, and trouble of four kinds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.data.joining import Recording, join_recording, recordings

Entries = Sequence[Mapping[str, Any]]
Make = Callable[[Entries, int], Iterator[Recording]]
"""(manifest entries, how many recordings) to the recordings; always the same ones."""

BURST_S, BURST_LEVEL = (0.3, 2.0), 0.1  # 20 dB below full scale, about the level of speech
STRESS_UTTERANCES = 8
PAUSE_S = (0.3, 1.0)


@dataclass(frozen=True)
class Condition:
    """Recordings of one kind, of ``joined`` utterances each."""

    joined: int
    make: Make


def by_length(joined: int, pause_s: tuple[float, float]) -> Condition:
    """Utterances joined with pauses drawn from ``pause_s``."""
    return Condition(joined, lambda entries, number: recordings(entries, joined, pause_s, count=number))


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
    "plain": by_length(STRESS_UTTERANCES, PAUSE_S),
    "30 s silences": Condition(STRESS_UTTERANCES, long_silences),
    "noise bursts": Condition(STRESS_UTTERANCES, noise_bursts),
    "one speaker": Condition(STRESS_UTTERANCES, one_speaker),
    "speaker changes": Condition(STRESS_UTTERANCES, speaker_changes),
    "repetitions": Condition(STRESS_UTTERANCES, repetitions),
}
