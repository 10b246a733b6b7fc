"""Who speaks in the demo corpus: espeak-ng's accents and voice variants, dealt out so that splits share no variant."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ACCENTS = (
    "gmw/en-US",
    "gmw/en-US-nyc",
    "gmw/en",
    "gmw/en-029",
    "gmw/en-GB-scotland",
    "gmw/en-GB-x-rp",
    "gmw/en-GB-x-gbclan",
    "gmw/en-GB-x-gbcwmd",
)
# Left out: whispers, robots and echoes; and Alicia, f2, f3, f5 and victor, which come out a little different in every
# process, so that no seed repeats them. Variants that are hardly different (linda, belinda) stay in one split.
TEST_VARIANTS = ("Alex", "Andrea", "Mario", "Michael", "Storm", "adam", "belinda", "john", "linda", "m3")
DEV_VARIANTS = ("Annie", "f1", "m5", "paul")
TRAIN_VARIANTS = (
    *("Andy", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mike", "Nguyen", "Reed"),
    *("anika", "antonio", "aunty", "benjamin", "boris", "david", "ed", "edward", "f4", "grandma", "grandpa", "gustave"),
    *("ian", "iven", "klatt2", "m1", "m2", "m4", "m6", "m7", "m8", "marcelo", "max", "michel", "miguel", "mike2"),
    *("norbert", "pablo", "pedro", "quincy", "rob", "robert", "shelby", "steph", "travis"),
)


@dataclass(frozen=True)
class Speaker:
    """One voice and its habits: `pitch` and `pitch_range` on espeak's scale 0 to 100, `rate_wpm` in words a minute."""

    number: int
    voice: str
    pitch: int
    pitch_range: int
    rate_wpm: int


def draw_speakers(
    variants: Sequence[str], count: int, first_number: int, generator: np.random.Generator
) -> list[Speaker]:
    """Draw `count` speakers with different voices (accent and variant); every variant is used before one comes again.

    Raises: ValueError, where there are fewer voices than speakers.

    Example
    -------
    >>> draw_speakers(DEV_VARIANTS, 2, 200, np.random.default_rng(0))[0].number
    200
    """
    if count > len(variants) * len(ACCENTS):
        raise ValueError(f"{count} speakers need more than {len(variants)} variants in {len(ACCENTS)} accents")
    order = generator.permutation(len(variants))
    first_accent = generator.integers(len(ACCENTS), size=len(variants))
    speakers = []
    for index in range(count):
        turn, variant = divmod(index, len(variants))
        accent = ACCENTS[(first_accent[variant] + turn) % len(ACCENTS)]
        pitch, pitch_range, rate_wpm = (int(generator.integers(*span)) for span in ((35, 66), (30, 71), (140, 221)))
        voice = f"{accent}+{variants[order[variant]]}"
        speakers.append(Speaker(first_number + index, voice, pitch, pitch_range, rate_wpm))
    return speakers
