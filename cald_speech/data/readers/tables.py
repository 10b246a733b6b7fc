"""CSV and TSV: a line of column names, then a line for each utterance. SpeechBrain's CSV is one of them.

Fields with commas or line breaks stand in double quotes; in a TSV quotes are letters as others. A CSV may have
semicolons instead of commas, as spreadsheets write it in many countries.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cald_speech.data.encodings import read_text
from cald_speech.data.readers.records import Columns, Format, Record
from cald_speech.errors import UserError


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, {column: field}) of each line after the first. Raises UserError, with the line, for what is malformed."""
    text, is_tsv = read_text(path, "a table"), path.suffix.lower() in (".tsv", ".tab")
    header = text.partition("\n")[0]
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"delimiter": ","}
    if not is_tsv and "," not in header:
        options["delimiter"] = next((mark for mark in (";", "\t") if mark in header), ",")
    # A line feed ends a record; a field in quotes has it inside.
    lines = csv.reader((line + "\n" for line in text.split("\n")), strict=True, **options)
    names: list[str] | None = None
    line = 1
    try:
        for fields in lines:
            place, line = f"{path}:{line}", lines.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if names is None:
                names = [name.strip() for name in fields]
                twice = sorted({name for name in names if name and names.count(name) > 1})
                if twice:
                    raise UserError(f"{place}: expected each column once, but {twice[0]!r} is there twice. Rename one.")
            elif len(fields) != len(names):
                raise UserError(
                    f"{place}: expected {len(names)} fields, as the first line has, got {len(fields)}. Put a field "
                    "with the delimiter in it between double quotes, or mend the line."
                )
            else:
                yield place, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{line}: expected a line of a table, but {error}. Mend its quotes.") from error
    if names is None:
        raise UserError(f"{path}: expected a first line with the names of the columns, but the file is empty.")


def read(source: str, columns: Columns) -> Iterator[Record]:
    path = Path(source)
    for place, row in rows_of(path):
        row.pop("", None)  # the index that pandas writes has no name
        yield columns.record(row, place, path.absolute().parent)


def _matches(source: str) -> bool:
    return source.lower().endswith((".csv", ".tsv", ".tab")) and Path(source).is_file()


FORMAT = Format("a CSV or TSV with a line of column names", _matches, read)
