"""CSV and TSV: a line of column names, then a line for each utterance. SpeechBrain's CSV is one of them.

Fields with commas or line breaks stand in double quotes, with or without blanks before them. In a TSV quotes are
letters as others, but where its names stand in quotes, or quotes in a field are doubled. A CSV may have semicolons,
tabs or bars instead of commas, as spreadsheets write it in many countries. A table without a line of names is read
where `columns` says which number each column has, from 1 on.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cald_speech.data.encodings import read_text
from cald_speech.data.readers.records import Columns, Format, Record
from cald_speech.errors import UserError

DELIMITERS = (",", ";", "\t", "|")
_LOOKED_AT = 20  # lines, for the delimiter
_SAYS_DELIMITER = re.compile("sep=(.)\n")  # Excel's own first line
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def rows_of(path: Path, columns: Columns | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, {column: field}) of each utterance. Raises UserError, with the line, for what is malformed."""
    text, is_tsv = read_text(path, "a table"), path.suffix.lower() in (".tsv", ".tab")
    options = _options(text, is_tsv)
    numbers = _numbers(columns, text, options, path)
    if numbers and not is_tsv:
        options = _options_without_names(text, max(numbers)) or options
    names: list[str] | None = None
    for place, fields in _lines(text, options, path):
        if names is None and numbers:
            names = [str(number) for number in range(1, len(fields) + 1)]
            if max(numbers) > len(fields):
                raise UserError(
                    f"{place}: expected {max(numbers)} fields or more, since `columns` names the last of them, got "
                    f"{len(fields)}. Correct `columns`, or mend the line."
                )
        elif names is None:
            names = [name.strip() for name in fields]
            twice = sorted({name for name in names if name and names.count(name) > 1})
            if twice:
                raise UserError(f"{place}: expected each column once, but {twice[0]!r} is there twice. Rename one.")
            continue
        if len(fields) != len(names):
            raise UserError(
                f"{place}: expected {len(names)} fields, as the first line has, got {len(fields)}. Put a field "
                "with the delimiter in it between double quotes, or mend the line."
            )
        yield place, dict(zip(names, fields, strict=True))
    if names is None:
        raise UserError(f"{path}: expected a first line with the names of the columns, but the file is empty.")


def _lines(text: str, options: dict[str, Any], path: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, fields) of each line that has any. A line feed ends a record; a field in quotes has it inside."""
    lines, line = _reader(text, options), 1
    unquoted = _unquoted if options.get("quoting") == csv.QUOTE_NONE else lambda field: field
    try:
        for fields in lines:
            place, line = f"{path}:{line}", lines.line_num + 1
            if any(field.strip() for field in fields) and not (lines.line_num == 1 and _SAYS_DELIMITER.match(text)):
                yield place, [unquoted(field) for field in fields]
    except csv.Error as error:
        raise UserError(f"{path}:{line}: expected a line of a table, but {error}. Mend its quotes.") from error


def _reader(text: str, options: dict[str, Any]) -> Any:
    return csv.reader((line + "\n" for line in text.split("\n")), strict=True, skipinitialspace=True, **options)


def _unquoted(field: str) -> str:
    """A field of a TSV; quotes around it are letters, unless quotes in it are doubled."""
    is_quoted = '""' in field[1:-1] and _QUOTED.fullmatch(field)
    return field[1:-1].replace('""', '"') if is_quoted else field


def _options(text: str, is_tsv: bool) -> dict[str, Any]:
    header = text.partition("\n")[0]
    if is_tsv:
        is_quoted = all(_QUOTED.fullmatch(name) for name in header.split("\t"))
        return {"delimiter": "\t"} if is_quoted else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if said := _SAYS_DELIMITER.match(text):
        return {"delimiter": said[1]}
    marks = [mark for mark in DELIMITERS if mark in header]
    # The name of a column may have a comma, too: the delimiter is what the lines after it have as well.
    return (_options_without_names(text, 2, marks) if len(marks) > 1 else None) or {"delimiter": [*marks, ","][0]}


def _numbers(columns: Columns | None, text: str, options: dict[str, Any], path: Path) -> list[int]:
    """The numbers of the columns that are named, where they are numbers and no names of the first line."""
    named = [] if columns is None else columns.named
    if not named or not all(name.isascii() and name.isdigit() for name in named):
        return []
    first = next(_lines(text, options, path), (f"{path}:1", []))
    if set(named) <= {name.strip() for name in first[1]}:
        return []
    numbers = [int(name) for name in named]
    if min(numbers) < 1:
        raise UserError(
            f"{first[0]}: expected columns that are counted from 1, since the line has no such names, got "
            f"{min(numbers)}. Correct `columns`."
        )
    return numbers


def _options_without_names(text: str, needed: int, marks: Sequence[str] = DELIMITERS) -> dict[str, Any] | None:
    """The delimiter that gives the first lines the same number of fields, as many as are needed; None for none."""
    for mark in marks:
        try:
            rows = _reader(text, {"delimiter": mark})
            counts = {len(fields) for fields in islice((row for row in rows if row), _LOOKED_AT)}
        except csv.Error:
            continue
        if len(counts) == 1 and max(counts) >= max(2, needed):
            return {"delimiter": mark}
    return None


def read(source: str, columns: Columns) -> Iterator[Record]:
    path = Path(source)
    for place, row in rows_of(path, columns):
        row.pop("", None)  # the index that pandas writes has no name
        yield columns.record(row, place, path.absolute().parent)


def _matches(source: str) -> bool:
    return source.lower().endswith((".csv", ".tsv", ".tab")) and Path(source).is_file()


FORMAT = Format("a CSV or TSV, with a line of column names or columns by number", _matches, read)
