"""MPEG audio (MP3), frame by frame: how long it is, is a guess where no frame count (Xing) stands before the frames.

A decoder that believes the guess leaves out what lies beyond it, and one that believes a frame count leaves out what
was joined behind. So each stretch of frames becomes a part with a frame count of its own.
"""

from functools import lru_cache
from typing import NamedTuple

from cald_speech.audio_files.parts import Bytes, Layout, Part

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # by version
_KBITS = {
    (3, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (3, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (3, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}  # by (MPEG 1 or 2, layer: 3 is I, 1 is III)
_FAR = 2**16  # how far the first frame is looked for


class Frame(NamedTuple):
    """What a frame's header says."""

    kind: tuple[int, int, int]  # version, layer, rate
    length: int  # bytes
    count_at: int  # where a frame count would stand, from the frame's begin; 0 for layers that have none


class Count(NamedTuple):
    """A frame count, as the first frame of a stretch."""

    at: int
    frames: int
    num_bytes: int  # 0 for unknown
    head: bytes  # the frame itself


def mpeg_layout(content: Bytes) -> Layout | None:
    """The stretches of frames as parts, up to the first damage; None for what is no MPEG audio."""
    start = _first_frame(content)
    if start is None:
        return None
    end = _end(content)
    count = _count(content, start, _frame(content(start, 4)))
    if count is not None and count.frames and start + count.num_bytes == end:
        return Layout()
    return _walked(content, start, end)


def _walked(content: Bytes, start: int, end: int) -> Layout:
    at, parts, fault = start, [], None
    while at < end and fault is None:
        head = _frame(content(at, 4))
        if head is None:
            tag = _tag(content, at)
            if not tag and any(content(at, min(end - at, _FAR))):
                again = _next_frame(content, at, end)
                if again is not None:
                    fault = f"the audio is damaged at byte {at}"
            at = at + tag if tag else end
            continue
        count = _count(content, at, head)
        begin, frames, here = at, 0, head
        if count is not None:
            at += head.length
            here = _frame(content(at, 4))
        while here is not None and here.kind == head.kind and at + here.length <= end:
            if frames and _count(content, at, here):
                break
            frames, at = frames + 1, at + here.length
            here = _frame(content(at, 4)) if at < end else None
        if here is not None and here.kind == head.kind and at + here.length > end:
            fault = "the audio is cut off within its last frame"
        elif count is not None and count.frames > frames:
            fault = f"the audio is cut off, {count.frames - frames} of {count.frames} frames are missing"
        if frames:
            parts.append(_part(content, begin, at, head, count, frames))
        elif fault is None:
            at = max(at, begin + head.length)
    return Layout(tuple(parts), fault)


def _part(content: Bytes, begin: int, stop: int, head: Frame, count: Count | None, frames: int) -> Part:
    """The frames up to ``stop`` behind a frame count that is right."""
    if count is not None and count.frames == frames:
        return Part(begin, stop)
    if count is not None:
        patched = bytearray(count.head)
        at = head.count_at
        flags = int.from_bytes(patched[at + 4 : at + 8], "big")
        patched[at + 4 : at + 8] = (flags | 1).to_bytes(4, "big")
        if not flags & 1:
            return Part(begin + head.length, stop)
        patched[at + 8 : at + 12] = frames.to_bytes(4, "big")
        if flags & 2:
            patched[at + 12 : at + 16] = (stop - begin).to_bytes(4, "big")
        if flags == 15 and len(patched) >= at + 144:  # an encoder's own field: what it filled in at the end is cut off
            patched[at + 142] &= 0xF0
            patched[at + 143] = 0
        return Part(begin + head.length, stop, bytes(patched))
    if not head.count_at:
        return Part(begin, stop)
    return Part(begin, stop, _counting_frame(content(begin, 4), frames))


def _counting_frame(head: bytes, frames: int) -> bytes:
    """A silent frame like that of ``head`` (4 bytes) that says how many follow."""
    for index in range(head[2] >> 4, 15):
        own = bytes([head[0], head[1] | 1, index << 4 | head[2] & 0x0D, head[3]])
        frame = _frame(own)
        if frame is not None and frame.length >= frame.count_at + 12:
            body = bytearray(frame.length)
            body[:4] = own
            body[frame.count_at : frame.count_at + 12] = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
            return bytes(body)
    return b""


@lru_cache(maxsize=4096)
def _frame(head: bytes) -> Frame | None:
    """What the four bytes of a frame's header say; None where they are none, or of a length that nobody knows."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bits, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 0 or bits in (0, 15) or rate == 3:
        return None
    hertz = _RATES[version][rate]
    table = _KBITS[(3, layer) if version == 3 else (2, 3 if layer == 3 else 2)]
    per_second = 1000 * table[bits - 1]
    if layer == 3:
        length = (12 * per_second // hertz + padding) * 4
    else:
        length = (72 if layer == 1 and version != 3 else 144) * per_second // hertz + padding
    mono = head[3] >> 6 == 3
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    return Frame((version, layer, hertz), length, 4 + side if layer == 1 else 0)


def _count(content: Bytes, at: int, frame: Frame | None) -> Count | None:
    if frame is None or not frame.count_at or content(at + frame.count_at, 4) not in (b"Xing", b"Info"):
        return None
    head = content(at, frame.length)
    flags = int.from_bytes(head[frame.count_at + 4 : frame.count_at + 8], "big")
    fields = [int.from_bytes(head[frame.count_at + place : frame.count_at + place + 4], "big") for place in (8, 12)]
    return Count(at, fields[0] if flags & 1 else 0, fields[1] if flags & 3 == 3 else 0, head)


def _tag(content: Bytes, at: int) -> int:
    """How many bytes of names, pictures and the like stand at ``at``."""
    head = content(at, 32)
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 128:
        return 10 + sum(byte << 7 * place for byte, place in zip(head[6:10], (3, 2, 1, 0), strict=True))
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX":
        return 32 + int.from_bytes(head[12:16], "little")
    return 0


def _end(content: Bytes) -> int:
    """Where the frames end, tags behind them left out."""
    end = content.size
    if content(max(0, end - 128), 3) == b"TAG":
        end -= 128
    footer = content(max(0, end - 32), 32)
    if footer[:8] == b"APETAGEX":
        end -= int.from_bytes(footer[12:16], "little") + (32 if footer[23] & 0x80 else 0)
    return max(0, end)


def _first_frame(content: Bytes) -> int | None:
    at = 0
    while tag := _tag(content, at):
        at += tag
    if at == 0 and _frame(content(0, 4)) is None:
        return None
    return _next_frame(content, at, min(content.size, at + _FAR))


def _next_frame(content: Bytes, at: int, end: int) -> int | None:
    """The first place from ``at`` on where two frames of one kind follow each other (or one ends the file)."""
    while at + 4 <= end:
        frame = _frame(content(at, 4))
        if frame is not None:
            after = _frame(content(at + frame.length, 4))
            if at + frame.length >= content.size or (after is not None and after.kind == frame.kind):
                return at
        window = content(at + 1, min(end - at - 1, 4096))
        found = window.find(b"\xff")
        at += 1 + (found if found >= 0 else max(1, len(window)))
    return None
