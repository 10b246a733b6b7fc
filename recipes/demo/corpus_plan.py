"""The plan of the demo corpus: which splits there are, and who says what in them. No sound is made here."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from cald_speech.recipes.demo.commands import draw_command
from cald_speech.recipes.demo.voices import DEV_VARIANTS, TEST_VARIANTS, TRAIN_VARIANTS, draw_speakers

RATE_LIMITS_WPM = (130, 230)


@dataclass(frozen=True)
class Split:
    """What one split holds; `first_speaker` keeps the numbers of the splits apart, as `variants` keeps their voices."""

    name: str
    variants: tuple[str, ...]
    first_speaker: int
    num_speakers: int
    num_utterances: int
    snr_db: tuple[float, float] = (10.0, 30.0)


# Each split avoids the word sequences of those before it, so the test set does not depend on how large train is.
HELD_OUT_SPLITS = (
    Split("test", TEST_VARIANTS, first_speaker=3001, num_speakers=15, num_utterances=450, snr_db=(15.0, 30.0)),
    Split("dev", DEV_VARIANTS, first_speaker=2001, num_speakers=4, num_utterances=40, snr_db=(15.0, 30.0)),
)
# What the demo's students are trained on: labels are few, as they are for a user.
DEFAULT_SPLITS = (
    *HELD_OUT_SPLITS,
    Split("train-few", TRAIN_VARIANTS, first_speaker=5001, num_speakers=52, num_utterances=416),
)
# What the demo's teacher was trained on: four hours in the same voices. The demo itself does without it.
TEACHER_SPLITS = (
    *HELD_OUT_SPLITS,
    Split("train", TRAIN_VARIANTS, first_speaker=1001, num_speakers=104, num_utterances=1560),
    Split("train-more", TRAIN_VARIANTS, first_speaker=4001, num_speakers=240, num_utterances=6000),
)


@dataclass(frozen=True)
class Utterance:
    """One line to be spoken: where it goes, its transcript, and what espeak is asked."""

    speaker: int
    index: int
    text: str
    voice: str
    rate_wpm: int
    pitch: int
    pitch_range: int

    @property
    def name(self) -> str:
        return f"{self.speaker}-1-{self.index:04d}"


def draw_corpus(*, seed: int, splits: Sequence[Split]) -> dict[str, list[Utterance]]:
    """Draw who says what in each split, {split name: utterances}, without speaking it.

    Example
    -------
    >>> draw_corpus(seed=0, splits=DEFAULT_SPLITS)["test"][0].name
    '3001-1-0000'
    """
    taken: set[str] = set()
    drawn = {}
    for split in splits:
        drawn[split.name] = _draw_utterances(split, seed, taken)
        taken.update(utterance.text for utterance in drawn[split.name])
    return drawn


def _draw_utterances(split: Split, seed: int, taken: Collection[str]) -> list[Utterance]:
    generator = split_generator(seed, split, "words")
    speakers = draw_speakers(split.variants, split.num_speakers, split.first_speaker, generator)
    utterances = []
    while len(utterances) < split.num_utterances:
        text = draw_command(generator)
        if text in taken:
            continue
        index, which = divmod(len(utterances), len(speakers))
        speaker = speakers[which]
        rate_wpm = int(np.clip(speaker.rate_wpm + generator.integers(-15, 16), *RATE_LIMITS_WPM))
        pitch = speaker.pitch + int(generator.integers(-5, 6))
        utterances.append(
            Utterance(speaker.number, index, text, speaker.voice, rate_wpm, pitch, speaker.pitch_range)
        )  # fmt: skip
    return utterances


def split_generator(seed: int, split: Split, purpose: str) -> np.random.Generator:
    """One generator for each purpose and split: more words in one leave all other draws as they were."""
    return np.random.default_rng([seed, *split.name.encode(), *purpose.encode()])
