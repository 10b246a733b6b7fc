"""Connected digits: which clips, in which order, with which pauses; and how they sound.

A string joins 1 to 5 clips of one speaker of the Free Spoken Digit Dataset (FSDD), named {digit}_{speaker}_{index}.
The data set's own split is by index: 0 to 4 are its test clips. Run this file to write test_strings.json again.

A cued string is a task that needs distance: its first digit, seconds before the others, says how they are written.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torchaudio.functional import resample

from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.files import whole_file

WORDS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
# The five speakers of the test strings. The public data set has a sixth, lucas, who is free to train on.
SPEAKERS = ("george", "jackson", "nicolas", "theo", "yweweler")
TEST_INDICES, TRAIN_INDICES, VALID_INDICES = range(0, 5), range(5, 45), range(45, 50)
NUM_TEST_STRINGS = 1_000
TEST_SEED = 20_240
LONGEST = 5
GAP_S = (0.05, 0.25)
LONGEST_CUED = 3
FIRST_PLUS_ONE = 5  # cues from here on


@dataclass(frozen=True)
class DigitString:
    """`clips` in order; `gaps_s` are the pauses before, between and after them (one more than clips)."""

    speaker: str
    clips: tuple[str, ...]
    gaps_s: tuple[float, ...]
    noise_seed: int

    @property
    def text(self) -> str:
        return " ".join(WORDS[digit] for digit in self.digits)

    @property
    def digits(self) -> list[int]:
        return [int(clip.split("_")[0]) for clip in self.clips]


@dataclass(frozen=True)
class CuedString(DigitString):
    """Its first digit is a cue: from FIVE on every later digit is written plus one, NINE as ZERO.

    Example
    -------
    >>> CuedString("theo", ("7_theo_3", "3_theo_0", "9_theo_1"), (0.1, 9.0, 0.1, 0.1), 0).text
    'SEVEN FOUR ZERO'
    """

    @property
    def text(self) -> str:
        cue, *others = self.digits
        return " ".join(WORDS[digit] for digit in [cue, *((d + (cue >= FIRST_PLUS_ONE)) % 10 for d in others)])


def draw_strings(
    name: str,
    count: int,
    speakers: Sequence[str],
    indices: Sequence[int],
    seed: int,
    *,
    cue_pause_s: tuple[float, float] | None = None,
) -> dict[str, DigitString]:
    """Draw `count` strings, with ids <name>-00000 and so on; the same arguments always give the same strings.

    With `cue_pause_s`, (shortest, longest), they are cued ones: a cue, such a pause, and one to three digits.

    Example
    -------
    >>> draw_strings("valid", 1, ["theo"], VALID_INDICES, seed=1)["valid-00000"].speaker
    'theo'
    """
    generator = np.random.default_rng([seed, *name.encode()])
    strings = {}
    for number in range(count):
        speaker = speakers[number % len(speakers)]
        length = (
            generator.integers(1, LONGEST + 1) if cue_pause_s is None else 1 + generator.integers(1, LONGEST_CUED + 1)
        )
        clips = tuple(f"{generator.integers(10)}_{speaker}_{generator.choice(indices)}" for _ in range(length))
        gaps_s = generator.uniform(*GAP_S, size=length + 1)
        if cue_pause_s is not None:
            gaps_s[1] = generator.uniform(*cue_pause_s)
        gaps_s = tuple(round(float(gap), 3) for gap in gaps_s)
        kind = DigitString if cue_pause_s is None else CuedString
        strings[f"{name}-{number:05d}"] = kind(speaker, clips, gaps_s, int(generator.integers(2**31)))
    return strings


def draw_test_strings() -> dict[str, DigitString]:
    """The fixed test set, as committed in test_strings.json."""
    return draw_strings("test", NUM_TEST_STRINGS, SPEAKERS, TEST_INDICES, TEST_SEED)


def write_strings(path: Path, strings: dict[str, DigitString]) -> None:
    """Write strings as JSON, one on each line. Atomic."""
    lines = (f"{json.dumps(name)}: {json.dumps(asdict(string))}" for name, string in strings.items())
    with whole_file(path) as unfinished:
        unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_strings(path: Path) -> dict[str, DigitString]:
    """Read what `write_strings` wrote."""
    entries = json.loads(path.read_text())
    return {
        name: DigitString(entry["speaker"], tuple(entry["clips"]), tuple(entry["gaps_s"]), entry["noise_seed"])
        for name, entry in entries.items()
    }


def join(string: DigitString, load: Callable[[str], torch.Tensor], *, perturb: bool = False) -> torch.Tensor:
    """Join the clips of `string` with its pauses: (N,) float32 at 16 kHz, over low noise that never stops.

    The noise, 40 to 55 dB below full scale, covers clips and pauses alike, so that no edge tells where a clip begins.
    With `perturb`, each clip is played at 0.8 to 1.2 of its speed: five speakers with 400 clips each are few voices.
    """
    if perturb:
        speeds = iter(torch.randint(16, 25, (len(string.clips),), generator=_generator(string, stream=1)).tolist())
        original = load

        def load(clip: str) -> torch.Tensor:
            return resample(original(clip), next(speeds), 20)

    parts = [torch.zeros(round(string.gaps_s[0] * SAMPLE_RATE))]
    for clip, gap_s in zip(string.clips, string.gaps_s[1:], strict=True):
        parts += [load(clip), torch.zeros(round(gap_s * SAMPLE_RATE))]
    speech = torch.cat(parts)
    generator = _generator(string, stream=0)
    level_db = -40 - 15 * torch.rand((), generator=generator)
    return speech + 10 ** (level_db / 20) * torch.randn(speech.shape, generator=generator)


def _generator(string: DigitString, *, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(string.noise_seed + stream)


if __name__ == "__main__":
    write_strings(Path(__file__).with_name("test_strings.json"), draw_test_strings())
