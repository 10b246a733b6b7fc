"""A form with a file, from the network to an unnamed file on the disk, in bounded memory.

The file has no name from the moment it is made, so that nothing is left of it however the request or the server ends.
What reads it opens ``/proc/self/fd/<number>``.
"""

import asyncio
import errno
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cald_speech.serving.asked import Refused

WRITTEN_AT_ONCE = 2**20  # bytes
MOST_FIELDS, MOST_OF_A_FIELD = 64, 2**16
BESIDE_THE_FILE = 2**20  # bytes that all else in a form may have
IDLE_S = 30.0


class ClientLeft(Exception):
    """Whoever asked is gone: nobody is to be answered."""


class Form:
    """The fields of a form, with all their values, and its file."""

    def __init__(self) -> None:
        self.fields: dict[str, list[str]] = {}
        self.file: BinaryIO | None = None
        self.name = ""

    @property
    def path(self) -> Path:
        """Where the file can be opened while the form is open."""
        return Path(f"/proc/self/fd/{self.file.fileno()}")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


async def read_form(
    headers: Mapping[str, str],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    *,
    folder: Path | None,
    max_bytes: int,
    idle_s: float = IDLE_S,
) -> Form:
    """The form that a request's body holds.

    Arguments
    ---------
    headers : of the request, by lower-case names.
    receive : gives ASGI's messages of the body.
    folder : for the file; None is the system's for temporary files.
    max_bytes : that the file may have.
    idle_s : how long a client may send nothing.

    Raises
    ------
    Refused
        for what is no form, has no file or too much, for a full disk, and for a client that stops sending.
    ClientLeft
        where the connection ends before the body does.
    """
    reader = _Reader(headers.get("content-type", ""), folder, max_bytes)
    length = headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > max_bytes + BESIDE_THE_FILE:
        raise too_large(max_bytes)
    try:
        more, total = True, 0
        while more:
            try:
                message = await asyncio.wait_for(receive(), idle_s)
            except TimeoutError:
                raise Refused(408, f"expected more of the upload, but nothing came for {idle_s:g} s") from None
            if message["type"] == "http.disconnect":
                raise ClientLeft
            more, body = message.get("more_body", False), message.get("body", b"")
            total += len(body)
            if total > max_bytes + BESIDE_THE_FILE:
                raise too_large(max_bytes)
            reader.feed(body)
            if len(reader.waiting) >= WRITTEN_AT_ONCE:
                await asyncio.to_thread(reader.write)
        reader.write()
        return reader.finished()
    except BaseException:
        reader.form.close()
        raise


def too_large(max_bytes: int) -> Refused:
    message = f"file: expected at most {max_bytes / 1e6:g} MB, got more: cut the recording or compress it"
    return Refused(413, message, param="file")


class _Reader:
    """Takes a body piece by piece. Raises Refused for what is no form."""

    def __init__(self, content_type: str, folder: Path | None, max_bytes: int):
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser, parse_options_header

        self.broken, self.options_of = FormParserError, parse_options_header
        self.form, self.folder, self.max_bytes = Form(), folder, max_bytes
        self.waiting, self.size, self.ended = bytearray(), 0, False
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise Refused(
                400, f"expected a form with a file (multipart/form-data, with a boundary), got {content_type[:80]!r}"
            )
        calls = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end")
        calls += ("headers_finished", "end")
        callbacks = {f"on_{name}": getattr(self, f"_{name}") for name in calls}
        try:
            self.parser = MultipartParser(options[b"boundary"], callbacks)
        except FormParserError as error:
            raise Refused(400, f"expected a form with a file: {error}") from None

    def feed(self, body: bytes) -> None:
        try:
            self.parser.write(body)
        except self.broken as error:
            raise Refused(400, f"expected a form as multipart/form-data has it: {error}") from None

    def write(self) -> None:
        """Have on the disk what came of the file so far."""
        if self.form.file is None or not self.waiting:
            return
        try:
            self.form.file.write(self.waiting)
            self.form.file.flush()
        except OSError as error:
            raise _no_room(error) from error
        self.waiting.clear()

    def finished(self) -> Form:
        if not self.ended:
            raise Refused(400, "expected a whole form, but it ends before its last boundary")
        if self.form.file is None:
            raise Refused(400, "file: expected the field of a recording, got none", param="file")
        if not self.size:
            raise Refused(400, "file: expected a recording, got an empty file", param="file")
        return self.form

    def _part_begin(self) -> None:
        self.header, self.value, self.headers = bytearray(), bytearray(), {}
        self.target: bytearray | None = None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def _header_end(self) -> None:
        self.headers[bytes(self.header).lower()] = bytes(self.value)
        self.header, self.value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = self.options_of(self.headers.get(b"content-disposition", b""))
        self.key = options.get(b"name", b"").decode("utf-8", "replace")
        if not self.key:
            raise Refused(400, "expected a name with every part of the form, got a part without")
        if b"filename" not in options:
            self.target = bytearray()
            return
        if self.key != "file" or self.form.file is not None:
            raise Refused(400, f"file: expected one file, under this name, got another as {self.key[:40]!r}")
        self.form.name = options[b"filename"].decode("utf-8", "replace")
        try:
            self.form.file = tempfile.TemporaryFile(prefix="cald_speech.", dir=self.folder)  # noqa: SIM115
        except OSError as error:
            raise _no_room(error) from error

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self.target is None:
            self.size += end - start
            if self.size > self.max_bytes:
                raise too_large(self.max_bytes)
            self.waiting += data[start:end]
            return
        self.target += data[start:end]
        if len(self.target) > MOST_OF_A_FIELD:
            raise Refused(413, f"{self.key[:40]}: expected at most {MOST_OF_A_FIELD:,} bytes, got more")

    def _part_end(self) -> None:
        if self.target is None:
            return
        self.form.fields.setdefault(self.key, []).append(self.target.decode("utf-8", "replace"))
        if sum(map(len, self.form.fields.values())) > MOST_FIELDS:
            raise Refused(400, f"expected at most {MOST_FIELDS} fields, got more")

    def _end(self) -> None:
        self.ended = True


def _no_room(error: OSError) -> Refused:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = "its disk is full" if full else f"its folder for uploads cannot be written ({error.strerror})"
    return Refused(507, f"the server cannot keep the recording while it reads it: {reason}")
