"""Text as it comes: UTF-8, or UTF-16 and 32 with a byte order mark; other bytes are told by their line."""

import codecs
from pathlib import Path

from cald_speech.errors import UserError

# In this order: that of UTF-32 begins with that of UTF-16.
_MARKS = {
    (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE): "utf-32",
    (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE): "utf-16",
}


def read_text(path: str | Path, what: str = "text") -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 or 32 with one; lines end in "\\n".

    Raises: UserError, where the file cannot be read, or holds other bytes; it names the line, and ``what`` was due.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> _ = path.write_bytes(b"\\xef\\xbb\\xbfone\\r\\ntwo")
    >>> read_text(path)
    'one\\ntwo'
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected {what}, but the file cannot be read ({error}). Check the path.") from error
    return decoded(content, path, what)


def decoded(content: bytes, path: str | Path, what: str = "text", *, first_line: int = 1) -> str:
    """The text that a file's ``content`` is, as `read_text`; ``first_line`` is the number of its first line."""
    wide = (name for marks, name in _MARKS.items() if content.startswith(marks))
    try:
        text = content.decode(next(wide, "utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + first_line
        raise UserError(
            f"{path}:{line}: expected {what} in UTF-8, or in UTF-16 with a byte order mark, but the byte "
            f"0x{error.object[error.start]:02X} there is neither. Save the file as UTF-8."
        ) from error
    # A carriage return alone ends a line only where nothing else does: it may stand in a text.
    return text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
