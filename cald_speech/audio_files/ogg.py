"""Ogg files, page by page: one stream may follow another, and decoders skip a damaged page in silence."""

import zlib

from cald_speech.audio_files.parts import Bytes, Layout, Part

_CONTINUED, _FIRST, _LAST = 1, 2, 4  # flags in the header of a page
_CUT_OFF = "the audio is cut off, its last page is missing"
# zlib's checksum takes the lowest bit first, Ogg's the highest.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_layout(content: Bytes) -> Layout:
    """The links of a chained file as parts, up to the first page that is cut off, damaged or missing."""
    links: list[list[int]] = []
    numbers: dict[bytes, int] = {}
    at, in_header, ended, fault = 0, False, False, None
    while at < content.size:
        page = _page(content, at)
        if page is None:
            fault = _CUT_OFF if _runs_over(content, at) else f"the audio is damaged at byte {at}"
            break
        flags, stream, number = page[5], page[14:18], int.from_bytes(page[18:22], "little")
        if flags & _FIRST and not in_header:  # several streams side by side begin together
            links.append([at, at])
            numbers = {}
        if number != numbers.get(stream, number - 1) + 1:
            fault = f"pages are missing before byte {at}"
            break
        numbers[stream], in_header, ended = number, bool(flags & _FIRST), bool(flags & _LAST)
        at += len(page)
        if links:
            links[-1][1] = at
    if fault is None and not ended:
        fault = _CUT_OFF
    one = len(links) == 1 and fault is None and links[0] == [0, content.size]
    return Layout(() if one else tuple(Part(*link) for link in links), fault)


def _page(content: Bytes, at: int) -> bytes | None:
    """The page that begins at ``at``; None where there is no whole one."""
    size = _size(content, at)
    page = content(at, size) if size else b""
    if not size or len(page) < size:
        return None
    without = page[:22] + bytes(4) + page[26:]
    rest = zlib.crc32(without.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return page if rest.to_bytes(4, "big").translate(_REVERSED) == page[22:26] else None


def _size(content: Bytes, at: int) -> int:
    head = content(at, 27)
    if len(head) < 27 or head[:4] != b"OggS":
        return 0
    table = content(at + 27, head[26])
    return 27 + head[26] + sum(table) if len(table) == head[26] else 0


def _runs_over(content: Bytes, at: int) -> bool:
    """Whether the page at ``at`` is longer than what is there."""
    size = _size(content, at)
    return at + size > content.size if size else content.size - at < 27 + 255
