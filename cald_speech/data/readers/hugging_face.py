"""Hugging Face data sets: parquet files, and sets on the hub, by the package `datasets` (the extra ``data``).

An address is ``hf://owner/name?split=train``. More options of it: ``config=en``, ``revision=main``, ``limit=1000``
(utterances, from the first on) and ``streaming=yes``, which fetches no more than is read.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cald_speech.data.readers.records import Columns, Format, Record
from cald_speech.errors import UserError

_OPTIONS = ("split", "config", "revision", "limit", "streaming")


def read_parquet(source: str, columns: Columns) -> Iterator[Record]:
    path, datasets = Path(source), _datasets(source)
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        names = file.schema_arrow.names
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
    except Exception as error:  # pyarrow and datasets raise errors of many kinds, for a damaged file too
        raise UserError(f"{path}: expected a parquet file, but it cannot be read ({_first_line(error)}).") from error

    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: expected each column once, but {twice!r} is there twice. Rename one.")

    def rows(names: list[str]) -> Iterator[dict[str, Any]]:
        for batch in file.iter_batches(64, columns=names):  # never the whole file in memory
            yield from batch.to_pylist()

    yield from _records(features, rows, str(path), path.absolute().parent, columns)


def read_hub(source: str, columns: Columns) -> Iterator[Record]:
    name, options = parse(source)
    datasets = _datasets(source)
    try:
        table = datasets.load_dataset(
            name,
            options.get("config"),
            split=options["split"],
            revision=options.get("revision"),
            streaming=options.get("streaming") == "yes",
        )
        if "limit" in options:
            limit = int(options["limit"])
            table = (
                table.take(limit) if options.get("streaming") == "yes" else table.select(range(min(limit, len(table))))
            )
        if table.features is None:  # of a stream, before anything of it is read
            table = table._resolve_features()
    except Exception as error:  # of the network, the hub, or the set itself
        raise UserError(f"{source}: the data set cannot be loaded: {_first_line(error)}") from error

    def rows(names: list[str]) -> Iterator[dict[str, Any]]:
        kept = table.select_columns(names)
        for name in names:
            if isinstance(table.features[name], datasets.Audio):
                kept = kept.cast_column(name, datasets.Audio(decode=False))
        yield from kept

    yield from _records(table.features, rows, source, Path.cwd(), columns)


def parse(source: str) -> tuple[str, Mapping[str, str]]:
    """The name of a set and its options, from ``hf://owner/name?split=train``. Raises UserError for other ones.

    Example
    -------
    >>> parse("hf://owner/name?split=test&limit=10")
    ('owner/name', {'split': 'test', 'limit': '10'})
    """
    try:
        parts = urlsplit(source)
        name, options = f"{parts.netloc}{parts.path}", dict(parse_qsl(parts.query, keep_blank_values=True))
    except ValueError:
        name, options = "", {}
    strange = [key for key in options if key not in _OPTIONS]
    numbers = re.fullmatch(r"[1-9][0-9]{0,11}", options.get("limit", "1"))
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name) or strange or "split" not in options or not numbers:
        raise UserError(
            f"{source}: expected hf://owner/name?split=train, and of {', '.join(_OPTIONS[1:])} what is wanted, such as "
            "&config=en&limit=1000&streaming=yes"
        )
    if options.get("streaming", "no") not in ("yes", "no"):
        raise UserError(f"{source}: streaming: expected yes or no, got {options['streaming']!r}")
    return name, options


def _records(
    features: Mapping[str, Any],
    rows: Callable[[list[str]], Iterator[dict[str, Any]]],
    source: str,
    folder: Path,
    columns: Columns,
) -> Iterator[Record]:
    """The records of the ``rows`` with the columns that are needed: classes by their names, audio as it is stored."""
    found = columns.find(list(features), source)
    needed = {name for column in found.values() for name in ([column] if isinstance(column, str) else column)}
    classes = {name: kind for name, kind in features.items() if hasattr(kind, "int2str")}
    try:
        for number, row in enumerate(rows(sorted(needed)), start=1):
            kept = {n: classes[n].int2str(v) if n in classes and v is not None else v for n, v in row.items()}
            audio = kept[found["audio"]]
            inner = audio.get("path") if isinstance(audio, Mapping) else None
            name = _name_of(inner) if isinstance(inner, str) and inner else f"{number:07d}"
            yield columns.record(kept, f"{source}: row {number}", folder, name=name)
    except UserError:
        raise
    except Exception as error:  # pyarrow, datasets and the network raise errors of many kinds while rows are read
        raise UserError(f"{source}: the data set cannot be read: {_first_line(error)}") from error


def _name_of(inner: str) -> str:
    """The id that a file's path inside of a set gives; of a whole path, which is of some machine, its last part."""
    path = PurePosixPath(inner)
    return path.stem if path.is_absolute() or ".." in path.parts else path.with_suffix("").as_posix()


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source}: this format needs the package datasets: pip install 'cald-speech[data]'") from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise UserError(
            f"{source}: expected the package datasets from version 4 on, which runs no code of a data set's, but "
            f"{datasets.__version__} is installed: pip install 'cald-speech[data]'"
        )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is told by the error
    return datasets


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


PARQUET = Format(
    "a parquet file of Hugging Face's datasets",
    lambda source: source.lower().endswith(".parquet") and Path(source).is_file(),
    read_parquet,
    embeds=True,
)
HUB = Format(
    "a data set on the hub (hf://owner/name?split=train)",
    lambda source: source.startswith("hf:"),
    read_hub,
    lambda source: [],
    embeds=True,
)
