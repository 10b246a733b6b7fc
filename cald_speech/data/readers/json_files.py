"""JSON: our manifests and SpeechBrain's ({id: {...}}), NeMo's (an object a line) and lhotse's cuts (.gz too).

What a file is tells its text, not its name: NeMo calls its manifests .json, and others write a list of objects.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from cald_speech.data.encodings import decoded, read_text
from cald_speech.data.readers import cuts
from cald_speech.data.readers.records import Columns, Format, Record
from cald_speech.errors import UserError

MOST_OF_A_LINE = 2**26
_KEY = re.compile(r'\s*\{?\s*("(?:[^"\\]|\\.)*")\s*:\s*\{')  # of an utterance, at the start of its line


def objects_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a file of JSON lines, which may be compressed with gzip."""
    if path.suffix.lower() != ".gz":
        yield from _objects_in(read_text(path, "JSON lines"), path)
        return
    for number, line in enumerate(_unpacked(path), start=1):
        text = decoded(line, path, "JSON lines", first_line=number)
        if text.strip():
            yield f"{path}:{number}", object_of(text, f"{path}:{number}", "an object in one line")


def _unpacked(path: Path) -> Iterator[bytes]:
    """Line by line: what a small file grows to may be more than the memory."""
    try:
        with gzip.open(path) as file:
            for number in count(1):
                line = file.readline(MOST_OF_A_LINE + 1)
                if len(line) > MOST_OF_A_LINE:
                    raise UserError(f"{path}:{number}: expected lines of up to {MOST_OF_A_LINE:,} bytes, got a longer.")
                if not line:
                    return
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected a file compressed with gzip, but {error}. Copy it again.") from error


def _objects_in(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, object_of(line, place, "an object in one line")


def read_lines(source: str, columns: Columns) -> Iterator[Record]:
    yield from _records(objects_of(Path(source)), Path(source), columns)


def _records(rows: Iterable[tuple[str, dict[str, Any]]], path: Path, columns: Columns) -> Iterator[Record]:
    for place, row in rows:
        if cuts.is_cut(row):
            yield cuts.record(row, place, path.absolute().parent)
        else:
            yield columns.record(row, place, path.absolute().parent)


def read_whole(source: str, columns: Columns) -> Iterator[Record]:
    path = Path(source)
    text = read_text(path, "a JSON manifest")
    if text.lstrip().startswith("["):
        yield from _records(_list_of(text, path), path, columns)
        return
    if _has_an_object_a_line(text):
        yield from _records(_objects_in(text, path), path, columns)
        return
    numbered = enumerate(text.split("\n"), start=1)
    lines = {match[1]: number for number, line in numbered if (match := _KEY.match(line))}
    rows = object_of(text, str(path), "a JSON manifest {id: {...}}")
    for name, row in rows.items():
        line = lines.get(json.dumps(name)) or lines.get(json.dumps(name, ensure_ascii=False))
        place = f"{path}: utterance {name!r}" if line is None else f"{path}:{line}: utterance {name!r}"
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object with audio and text, got {row!r:.80}. Mend it.")
        yield columns.record(row, place, path.absolute().parent, name=name)


def _has_an_object_a_line(text: str) -> bool:
    """Whether the first line is the whole of an utterance, and no manifest {id: {...}} written in one line."""
    first = text.lstrip().partition("\n")[0]
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not all(isinstance(value, dict) for value in found.values())


def _list_of(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(_parsed(text, str(path), "a JSON manifest", dict), start=1):
        place = f"{path}: entry {number}"
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object with audio and text, got {row!r:.80}. Mend it.")
        yield place, row


def object_of(text: str, place: str, what: str) -> dict[str, Any]:
    """The object that a text is. Raises UserError for what is none, or has a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            lines = [str(n) for n, line in enumerate(text.split("\n"), start=1) if json.dumps(twice) in line]
            where = f" (lines {' and '.join(lines[:2])})" if len(lines) > 1 else ""
            raise UserError(f"{place}: expected each key once, but {twice!r} is there twice{where}. Rename one.")
        return found

    found = _parsed(text, place, what, once)
    if not isinstance(found, dict):
        raise UserError(f"{place}: expected {what}, got {type(found).__name__}. Mend it.")
    return found


def _parsed(text: str, place: str, what: str, make: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    try:
        return json.loads(text, object_pairs_hook=make)
    except json.JSONDecodeError as error:
        inside = f"{place}:{error.lineno}" if error.lineno > 1 else place
        raise UserError(f"{inside}: expected {what}, but it cannot be parsed ({error}). Mend it.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: expected {what}, but it cannot be parsed ({error}). Mend it.") from error


def _is(source: str, *endings: str) -> bool:
    return source.lower().endswith(endings) and Path(source).is_file()


LINES = Format(
    "JSON lines of NeMo or with columns of your own, or lhotse's cuts (.jsonl, .jsonl.gz)",
    lambda source: _is(source, ".jsonl", ".jsonl.gz", ".ndjson"),
    read_lines,
)
WHOLE = Format("a JSON manifest, ours, SpeechBrain's or NeMo's", lambda source: _is(source, ".json"), read_whole)
