"""What an audio file says of its own size, in formats that libsndfile shortens to what is there without a word."""

import math
from pathlib import Path

# Programs that stream to a pipe cannot know the size and leave 0 or all ones.
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)
_END_OF_STREAM = 4  # a flag in the header of an Ogg page


def cut_off(path: Path) -> str | None:
    """What shows that a WAV, AIFF, RF64, NIST SPHERE or Ogg file ends early, else None. Of FLAC, decoding tells.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.wav"
    >>> _ = path.write_bytes(b"RIFF" + (92).to_bytes(4, "little"))
    >>> cut_off(path)
    'the audio is cut off, 92 of the 100 bytes are missing'
    """
    with path.open("rb") as file:
        header = file.read(1024)
        file.seek(max(0, path.stat().st_size - 2**17))
        tail = file.read()
    if header[:4] == b"OggS":
        last = tail.rfind(b"OggS")
        ends = last >= 0 and bool(tail[last + 5] & _END_OF_STREAM)
        return None if ends else "the audio is cut off, its last page is missing"
    declared, there = _declared_bytes(header), path.stat().st_size
    if declared is None or declared <= there:
        return None
    return f"the audio is cut off, {declared - there} of the {declared} bytes are missing"


def _declared_bytes(header: bytes) -> int | None:
    """How large a file with this header says it is; None where it does not."""
    # Four letters, the size of all that follows, and for RF64 the true size in a chunk of its own.
    sizes = {
        b"RIFF": int.from_bytes(header[4:8], "little"),
        b"FORM": int.from_bytes(header[4:8], "big"),
        b"RF64": int.from_bytes(header[20:28], "little"),
    }
    if header[:4] in sizes:
        size = sizes[header[:4]]
        return None if size in _UNKNOWN_SIZES else size + 8
    # "NIST_1A", the size of the header, and lines such as "sample_count -i 16000"
    if header[:8] != b"NIST_1A\n":
        return None
    fields = {words[0]: words[2] for line in header.split(b"\n") if len(words := line.split()) == 3}
    counts = [fields.get(key, b"") for key in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    if fields.get(b"sample_coding", b"pcm") != b"pcm" or not all(count.isdigit() for count in counts):
        return None
    return int(header.split()[1]) + math.prod(map(int, counts))
