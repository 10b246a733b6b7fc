"""What the header of an audio file says of its length, held against the bytes that are there.

libsndfile shortens most formats to what is there without a word, and believes a length that is too small. A length is a
hint: a program that writes to a pipe cannot know it, and 32 bits cannot count past 4 GiB.
"""

import math
from collections.abc import Callable
from pathlib import Path

from cald_speech.audio_files.mpeg import mpeg_layout
from cald_speech.audio_files.ogg import ogg_layout
from cald_speech.audio_files.parts import Bytes, Layout, Part, missing

# Programs that write to a pipe leave 0 or all ones (ffmpeg), 0x7FFFF000 (sox) or 0x80000000 (arecord).
PLACEHOLDERS = (range(0x7FFFE000, 0x80001000), range(0xFFFFE000, 0x100000000))
HUGE = 2**62  # the same of 64 bits
FOUR_GIB = 2**32
# Of what follows the sound, so little is taken for filling.
FILLING = 4096


def layout(path: Path) -> Layout:
    """How this file is to be opened. What has no length in its header, or is no audio, is left to the decoder.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.au"
    >>> _ = path.write_bytes(b".snd" + (24).to_bytes(4, "big") + (100).to_bytes(4, "big") + bytes(12))
    >>> layout(path).fault
    'the audio is cut off, 100 of the 124 bytes are missing'
    """
    with path.open("rb") as file:
        content = Bytes(file)
        head = content(0, 32)
        for magic, read in _READERS.items():
            if head.startswith(magic):
                return read(content)
        if head[4:8] == b"ftyp":
            return _mp4(content)
        return mpeg_layout(content) or Layout()


def _sized(start: int, declared: int, content: Bytes) -> Layout:
    """Sound of ``declared`` bytes from ``start`` on, with whatever behind it."""
    return Layout(fault=missing(start + declared, content.size) if start + declared > content.size else None)


def _is_placeholder(declared: int) -> bool:
    return declared >= HUGE or any(declared in places for places in PLACEHOLDERS)


def _wave(content: Bytes) -> Layout:
    """RIFF, RIFX, RF64 and BW64: the sound is a chunk; what others stand before it does not matter, but the format."""
    order = "big" if content(0, 4) == b"RIFX" else "little"
    if content(8, 4) != b"WAVE":
        return Layout()
    form, true_size, at = b"", None, 12
    while at + 8 <= content.size:
        name, length, begin = content(at, 4), content.number(at + 4, 4, order), at + 8
        if name == b"data":
            wide = length == 0xFFFFFFFF and true_size is not None
            return _wave_data(content, form, begin, true_size if wide else length, order, wide)
        if name == b"fmt ":
            form = content(at, 8 + length + length % 2) if length < FILLING else b""
        elif name == b"ds64":
            true_size = content.number(begin + 8, 8, "little")
        at = begin + length + length % 2
    return Layout()


def _wave_data(content: Bytes, form: bytes, begin: int, declared: int, order: str, wide: bool) -> Layout:
    there, name = content.size - begin, content(0, 4)
    to_the_end = Part(begin, content.size, _wave_header(form, there, order))
    follows = _what_follows(content, begin + declared + declared % 2, order)
    unknown = _is_placeholder(declared) if declared > there else declared == 0 and follows is not None
    if declared > there and not unknown:
        return Layout(fault=missing(begin + declared, content.size))
    if unknown or (follows is not None and not wide and there >= FOUR_GIB):
        return Layout((to_the_end,))
    if follows == "joined":
        first = Part(begin, begin + declared, _wave_header(form, declared, order))
        return Layout((first,), "another file is joined behind this one: take them apart, or convert the file with sox")
    if follows is not None:
        known = Part(begin, begin + declared, _wave_header(form, declared, order))
        return Layout((known,), f"more follows than the header says: {there - declared} bytes")
    return Layout((Part(begin, begin + declared, _wave_header(form, declared, order)),) if name == b"BW64" else ())


def _wave_header(form: bytes, length: int, order: str) -> bytes:
    """The first bytes of a WAV file with a sound of so many bytes; of RF64 where 32 bits cannot count them."""
    size = 4 + len(form) + 8 + length
    if size < FOUR_GIB:
        name = b"RIFX" if order == "big" else b"RIFF"
        return name + size.to_bytes(4, order) + b"WAVE" + form + b"data" + length.to_bytes(4, order)
    block = int.from_bytes(form[20:22], "little") or 1
    counts = [(size + 36).to_bytes(8, "little"), length.to_bytes(8, "little"), (length // block).to_bytes(8, "little")]
    wide = b"ds64" + (28).to_bytes(4, "little") + b"".join(counts) + bytes(4)
    return b"RF64" + b"\xff" * 4 + b"WAVE" + wide + form + b"data" + b"\xff" * 4


def _what_follows(content: Bytes, at: int, order: str) -> str | None:
    """What stands from ``at`` on, where that is not the end, more chunks, a tag or some filling."""
    while at + 8 <= content.size:
        name, length = content(at, 4), content.number(at + 4, 4, order)
        if name in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
            return "joined"
        if name[:3] in (b"TAG", b"ID3", b"APE") or content.size - at < 64:
            return None
        if not all(32 <= letter < 127 for letter in name) or at + 8 + length > content.size:
            rest = content(at, FILLING + 1)
            return None if len(rest) <= FILLING and not any(rest) else "no chunk"
        at += 8 + length + length % 2
    return None


def _iff(content: Bytes) -> Layout:
    """AIFF, AIFC, 8SVX and 16SV: the same in the other order of bytes."""
    at = 12
    while at + 8 <= content.size:
        name, length = content(at, 4), content.number(at + 4, 4, "big")
        if name in (b"SSND", b"BODY"):
            unknown = length == 0 or _is_placeholder(length)
            return Layout() if unknown else _sized(at + 8, length, content)
        at += 8 + length + length % 2
    declared = content.number(4, 4, "big")
    return Layout() if _is_placeholder(declared) else _sized(8, declared, content)


def _wave64(content: Bytes) -> Layout:
    at = 40
    while at + 24 <= content.size:
        name, length = content(at, 4), content.number(at + 16, 8, "little")
        if name == b"data":
            return Layout() if length <= 24 or length >= HUGE else _sized(at, length, content)
        at += max(24, -(-length // 8) * 8)
    return Layout()


def _caf(content: Bytes) -> Layout:
    at = 8
    while at + 12 <= content.size:
        name, length = content(at, 4), content.number(at + 4, 8, "big")
        if name == b"data" and length >= HUGE:  # -1: to the end
            return Layout()
        if at + 12 + length > content.size:
            return _sized(at + 12, length, content)
        at += 12 + length
    return Layout()


def _au(content: Bytes) -> Layout:
    order = "big" if content(0, 4) == b".snd" else "little"
    start, length = content.number(4, 4, order), content.number(8, 4, order)
    there = content.size - start
    if length == 0 and there > FILLING:
        header = content(0, 8) + b"\xff" * 4 + content(12, min(max(0, start - 12), FILLING))
        return Layout((Part(start, content.size, header),))
    return Layout() if _is_placeholder(length) else _sized(start, length, content)


def _sphere(content: Bytes) -> Layout:
    """NIST_1A, the size of the header, and lines such as "sample_count -i 16000"."""
    header = content(0, 1024)
    fields = {words[0]: words[2] for line in header.split(b"\n") if len(words := line.split()) == 3}
    counts = [fields.get(key, b"") for key in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    sizes = header.split()[1:2]
    if fields.get(b"sample_coding", b"pcm") not in (b"pcm", b"ulaw", b"alaw", b"mu-law"):
        return Layout()
    if not all(0 < len(count) < 16 and count.isdigit() for count in [*counts, *sizes]):
        return Layout()
    return _sized(int(sizes[0]), math.prod(map(int, counts)), content)


def _voc(content: Bytes) -> Layout:
    """Blocks of a letter and three bytes of length; the letter 0 ends the file."""
    at = content.number(20, 2, "little")
    while at + 4 <= content.size and content(at, 1) != b"\0":
        length = content.number(at + 1, 3, "little")
        if at + 4 + length > content.size:
            return _sized(at + 4, length, content)
        at += 4 + length
    return Layout()


def _mat5(content: Bytes) -> Layout:
    order = "little" if content(126, 2) == b"IM" else "big"
    at, over = 128, 8 if b"libsndfile" in content(0, 116) else 0  # which counts 8 bytes too many
    while at + 8 <= content.size:
        length = content.number(at + 4, 4, order)
        length -= over if at + 8 + length > content.size else 0
        if at + 8 + length > content.size:
            return _sized(at + 8, length, content)
        at += 8 + length
    return Layout()


def _mat4(content: Bytes) -> Layout:
    """Matrices: type, rows, columns, whether they are complex, length of the name; then the name and the numbers."""
    order = "little" if content(0, 4) == bytes(4) else "big"
    widths, at = (8, 4, 4, 2, 2, 1), 0
    while at + 20 <= content.size:
        kind, rows, columns, imaginary, name = (content.number(at + 4 * i, 4, order) for i in range(5))
        precision = kind // 10 % 10
        if precision >= len(widths):
            return Layout()
        length = name + rows * columns * widths[precision] * (2 if imaginary else 1)
        if at + 20 + length > content.size:
            return _sized(at + 20, length, content)
        at += 20 + length
    return Layout()


def _sample_dump(content: Bytes) -> Layout:
    """MIDI: packets of 127 bytes, 120 of them samples of two to four bytes."""
    bits, count = content(6, 1), content(10, 3)
    if len(count) < 3:
        return Layout()
    samples, a_packet = count[0] | count[1] << 7 | count[2] << 14, 120 // max(2, -(-bits[0] // 7))
    fault = _sized(21, -(-samples // max(1, a_packet)) * 127, content).fault
    return Layout(fault=fault, most_samples=(content.size - 21) // 127 * a_packet)


def _avr(content: Bytes) -> Layout:
    channels, width = 2 if content.number(12, 2, "big") else 1, content.number(14, 2, "big") // 8
    return _sized(128, content.number(26, 4, "big") * channels * width, content)


def _akai(content: Bytes) -> Layout:
    return _sized(42, content.number(30, 4, "little") * 2 * (1 + content.number(21, 1, "little")), content)


def _psion(content: Bytes) -> Layout:
    return _sized(32, content.number(18, 4, "big"), content)


def _xi(content: Bytes) -> Layout:
    return _sized(338, content.number(298, 4, "little"), content)


def _pvf(content: Bytes) -> Layout:
    """ "PVF1", then channels, rate and bits in a line: no length, but half a sample shows."""
    lines = content(0, 128).split(b"\n")
    words = lines[1].split() if len(lines) > 2 else []
    if len(words) != 3 or not all(word.isdigit() and len(word) < 9 for word in words):
        return Layout()
    start = len(lines[0]) + len(lines[1]) + 2
    return _whole_samples(content, start, int(words[0]) * (int(words[2]) // 8))


def _ircam(content: Bytes) -> Layout:
    order = "little" if content(0, 2) == b"\x64\xa3" else "big"
    width = {1: 1, 2: 2, 3: 3, 4: 4, 0x40004: 4, 0x10001: 1, 0x20001: 1}.get(content.number(12, 4, order), 0)
    return _whole_samples(content, 1024, content.number(8, 4, order) * width)


def _paris(content: Bytes) -> Layout:
    order = "little" if content(0, 4) == b"fap " else "big"
    width = {0: 2, 1: 32, 2: 1}.get(content.number(16, 4, order), 0)  # 24 bits come in blocks of ten samples
    return _whole_samples(content, 2048, content.number(20, 4, order) * width)


def _whole_samples(content: Bytes, start: int, width: int) -> Layout:
    over = (content.size - start) % width if width and content.size > start else 0
    return Layout(fault="the audio is cut off, it ends within a sample" if over else None)


def _flac(content: Bytes) -> Layout:
    """Where the number of samples is 0, unknown, the last frame alone shows that the file is whole: by its checksum."""
    if content(4, 1)[0:1] not in (b"\0", b"\x80") or content.number(18, 8, "big") & (2**36 - 1):
        return Layout()
    first = max(0, content.size - 2**17)
    tail = content(first, content.size - first)
    tail = tail[:-128] if tail[-128:-125] == b"TAG" else tail
    at = len(tail)
    for _ in range(64):
        at = max(tail.rfind(b"\xff\xf8", 0, at), tail.rfind(b"\xff\xf9", 0, at))
        if at < 0:
            break
        if not _flac_checksum(tail[at:]):
            return Layout()
    return Layout(fault="the audio is cut off within its last frame")


def _flac_checksum(frame: bytes) -> int:
    rest = 0
    for byte in frame:
        rest = rest << 8 & 0xFFFF ^ _FLAC_TABLE[rest >> 8 ^ byte]
    return rest


def _flac_table() -> list[int]:
    table = []
    for byte in range(256):
        rest = byte << 8
        for _ in range(8):
            rest = (rest << 1 ^ (0x8005 if rest & 0x8000 else 0)) & 0xFFFF
        table.append(rest)
    return table


_FLAC_TABLE = _flac_table()


def _mp4(content: Bytes) -> Layout:
    """MP4, M4A, MOV, 3GP: boxes; size 0 is the last box, to the end, and 1 announces 64 bits."""
    at = 0
    while at + 8 <= content.size:
        length = content.number(at, 4, "big")
        length = content.number(at + 8, 8, "big") if length == 1 else length
        if length == 0:
            break
        if length < 8 or at + length > content.size:
            return _sized(at, length, content) if length >= 8 else Layout()
        at += length
    return Layout()


def _matroska(content: Bytes) -> Layout:
    """WebM: a header, then one segment that may not know its size (all ones)."""
    at = 0
    while at + 12 <= content.size:
        _, name_width = _ebml(content, at, marker=True)
        length, width = _ebml(content, at + name_width, marker=False)
        begin = at + name_width + width
        if not name_width or not width or length == (1 << 7 * width) - 1:
            break
        if begin + length > content.size:
            return _sized(begin, length, content)
        at = begin + length
    return Layout()


def _ebml(content: Bytes, at: int, *, marker: bool) -> tuple[int, int]:
    """A number of one to eight bytes and its width, (0, 0) for none; ``marker`` keeps the bits that say how many."""
    first = content.number(at, 1, "big")
    if not first:
        return 0, 0
    width = 9 - first.bit_length()
    value = content.number(at, width, "big")
    return (value if marker else value & ((1 << 7 * width) - 1)), width


_READERS: dict[bytes, Callable[[Bytes], Layout]] = {
    **dict.fromkeys((b"RIFF", b"RIFX", b"RF64", b"BW64"), _wave),
    b"FORM": _iff,
    b"riff\x2e\x91\xcf\x11": _wave64,
    b"caff": _caf,
    **dict.fromkeys((b".snd", b"dns."), _au),
    b"NIST_1A\n": _sphere,
    b"Creative Voice File\x1a": _voc,
    b"MATLAB 5.0": _mat5,
    **dict.fromkeys((bytes(4) + b"\1\0\0\0\1\0\0\0", b"\0\0\x03\xe8\0\0\0\1"), _mat4),
    b"\xf0\x7e": _sample_dump,
    b"2BIT": _avr,
    b"\1\4": _akai,
    b"ALawSoundFile**": _psion,
    b"Extended Instrument: ": _xi,
    b"PVF1\n": _pvf,
    **dict.fromkeys((b" paf", b"fap "), _paris),
    **dict.fromkeys(
        (b"\x64\xa3\1\0", b"\x64\xa3\2\0", b"\x64\xa3\3\0", b"\x64\xa3\4\0", b"\0\1\xa3\x64", b"\0\2\xa3\x64"), _ircam
    ),
    b"fLaC": _flac,
    b"OggS": ogg_layout,
    b"\x1a\x45\xdf\xa3": _matroska,
}
MAGIC = tuple(_READERS)
