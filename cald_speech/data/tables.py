"""Tables of text: sentences, or pairs of them, with a label; what a text set is trained or tested on.

A table is a file of JSON lines, {"text": first sentence, "pair": second sentence or null, "label": name}; a row's id is
its place.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cald_speech.errors import UserError
from cald_speech.files import whole_file


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with ``text``, ``label`` and, perhaps, ``pair``. Atomic.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> write_table(path, [{"text": "it works", "label": "positive"}])
    >>> read_table(path)
    {'0': {'text': 'it works', 'pair': None, 'label': 'positive'}}
    """
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            line = {"text": row["text"], "pair": row.get("pair"), "label": row["label"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_table(path: str | Path) -> dict[str, dict[str, Any]]:
    """The rows of a table by their ids.

    Raises: UserError, naming file and line, where there is no table, no row, or a row that is none.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such table. Prepare the data first, or correct the path.")
    rows = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            rows[str(number)] = _row(path, number + 1, line)
    if not rows:
        raise UserError(f"{path}: expected at least one row, but there is none. Prepare the data again.")
    return rows


def write_tables_once(
    tables: Mapping[str, str | Path],
    sources: Sequence[Path],
    make: Callable[[], Mapping[str, Iterable[Mapping[str, Any]]]],
    **settings: Any,
) -> None:
    """Write what ``make()`` returns, the rows of each of the ``tables`` by its name, unless they stand there already.

    They are made again where a ``source`` changed (name, size, time), or the ``settings`` (JSON values) that ``make``
    depends on, or a table was edited.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> for text in ("first", "second"):
    ...     write_tables_once({"train": path}, [], lambda: {"train": [{"text": text, "label": "yes"}]}, seed=0)
    >>> read_table(path)["0"]["text"]
    'first'
    """
    paths = {name: Path(path) for name, path in tables.items()}
    first = next(iter(paths.values()))
    record = first.with_name(f".{first.stem}.prepared")
    stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    made_of = hashlib.sha256(json.dumps([stats, settings], sort_keys=True).encode()).hexdigest()
    if record.is_file() and json.loads(record.read_text()) == {"of": made_of, "tables": _file_hashes(paths)}:
        return
    rows = make()
    for name, path in paths.items():
        write_table(path, rows[name])
    with whole_file(record) as unfinished:
        unfinished.write_text(json.dumps({"of": made_of, "tables": _file_hashes(paths)}))


def _file_hashes(paths: Mapping[str, Path]) -> dict[str, str | None]:
    read = {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}
    return {name: None if of_one is None else hashlib.sha256(of_one).hexdigest() for name, of_one in read.items()}


def table_hash(path: str | Path) -> str:
    """SHA-256 (hex) over the rows. Raises: UserError, as `read_table`."""
    digest = hashlib.sha256()
    for row in read_table(path).values():
        digest.update(json.dumps([row["text"], row["pair"], row["label"]]).encode() + b"\n")
    return digest.hexdigest()


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        texts, label = (row["text"], row["pair"]), row["label"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}, line {number}: expected text, pair and label as JSON, got {line[:80]!r}") from error
    if not (isinstance(texts[0], str) and isinstance(texts[1], str | None) and isinstance(label, str)):
        raise UserError(f"{path}, line {number}: expected text, pair (or null) and label in words, got {line[:80]!r}")
    return {"text": texts[0], "pair": texts[1], "label": label}
