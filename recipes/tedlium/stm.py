"""STM files (NIST's segment time marks): what is said when in a recording, a line for each segment.

<recording> <channel> <speaker> <start, s> <end, s> <labels> <transcript>, the labels in angle brackets; lines from
;; on are comments.
"""

import math
from pathlib import Path
from typing import NamedTuple

from cald_speech.data.encodings import read_text
from cald_speech.errors import UserError

_LINE = "<recording> <channel> <speaker> <start> <end> <labels> <transcript>"
# Such a segment is there to be left out of a score: music, another language, what could not be understood.
NOT_SCORED = "ignore_time_segment_in_scoring"


class Segment(NamedTuple):
    """One line; ``place`` is its file and number."""

    place: str
    recording: str
    speaker: str
    start_s: float
    end_s: float
    text: str

    @property
    def is_scored(self) -> bool:
        return self.text.lower() != NOT_SCORED


def read_stm(path: str | Path) -> list[Segment]:
    """The segments of a file, in its order. Raises: UserError with file and line number for a malformed line.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "talk.stm"
    >>> _ = path.write_text(";; a comment\\ntalk 1 speaker 1.5 3.25 <o,f0,male> it 's on\\n")
    >>> read_stm(path)[0][1:]
    ('talk', 'speaker', 1.5, 3.25, "it 's on")
    """
    lines = read_text(path, "an STM file").split("\n")
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return [_segment(f"{path}:{number}", line) for number, line in numbered if not line.startswith(";;")]


def _segment(place: str, line: str) -> Segment:
    malformed = f"{place}: expected {_LINE}, got {line.strip()!r:.120}. Copy the file again, or mend the line."
    try:
        recording, _, speaker, start, end, labels, *text = line.split(maxsplit=6)
        start_s, end_s = float(start), float(end)
    except ValueError:
        raise UserError(malformed) from None
    if not (labels.startswith("<") and labels.endswith(">")):
        raise UserError(malformed)
    if not 0 <= start_s < end_s < math.inf:
        raise UserError(
            f"{place}: expected 0 <= start < end, got {start:.20} and {end:.20}. Copy the file again, or mend it."
        )
    return Segment(place, recording, speaker, start_s, end_s, " ".join(text).strip())
