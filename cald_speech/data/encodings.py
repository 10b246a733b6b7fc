"""Text as it comes: UTF-8 with or without a byte order mark, or UTF-16 with one; other bytes are told by their line."""

import codecs
from pathlib import Path

from cald_speech.errors import UserError


def read_text(path: str | Path, what: str = "text") -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one; lines end in "\\n".

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


def decoded(content: bytes, path: str | Path, what: str = "text") -> str:
    """The text that a file's ``content`` is, as `read_text`."""
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: expected {what} in UTF-8, or in UTF-16 with a byte order mark, but the byte "
            f"0x{error.object[error.start]:02X} there is neither. Save the file as UTF-8."
        ) from error
    # A carriage return alone ends a line only where nothing else does: it may stand in a text.
    return text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
