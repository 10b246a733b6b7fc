"""How a file is to be opened: as it is, or as parts that are audio files, and what shows that it is not whole."""

import os
from typing import BinaryIO, NamedTuple


class Part(NamedTuple):
    """A stretch of a file that is an audio file by itself, behind ``prefix`` instead of first bytes that mislead."""

    start: int
    stop: int
    prefix: bytes = b""


class Layout(NamedTuple):
    """``parts`` one after the other, none for a file that is opened as it is; ``fault`` where it is not whole.

    ``most_samples`` is what the bytes that are there can hold, for formats where a decoder makes up the rest.
    """

    parts: tuple[Part, ...] = ()
    fault: str | None = None
    most_samples: int = 2**61


class Bytes:
    """A file's bytes by place; what is asked for in order is read in large pieces.

    Example
    -------
    >>> import io
    >>> content = Bytes(io.BytesIO(b"RIFF1234"))
    >>> content(4, 2), content(6, 9), content.number(4, 2, "big") == 0x3132
    (b'12', b'34', True)
    """

    AT_ONCE = 2**18

    def __init__(self, file: BinaryIO):
        self.file, self.size = file, file.seek(0, os.SEEK_END)
        self._start, self._kept = 0, b""

    def __call__(self, at: int, count: int) -> bytes:
        """``count`` bytes from ``at`` on, fewer at the end."""
        first = at - self._start
        if first < 0 or first + count > len(self._kept):
            self.file.seek(at)
            self._start, self._kept, first = at, self.file.read(max(count, self.AT_ONCE)), 0
        return self._kept[first : first + count]

    def number(self, at: int, count: int, order: str) -> int:
        return int.from_bytes(self(at, count), order)


def missing(declared: int, there: int) -> str:
    """What is said of a file with fewer bytes than it says."""
    return f"the audio is cut off, {declared - there} of the {declared} bytes are missing"
