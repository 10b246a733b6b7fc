"""Files and folders that are either whole or absent: a killed run never leaves half of one behind."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary name in the folder of `path`; on success the file written there becomes `path`.

    The temporary name ends like `path`, because soundfile chooses a format by the ending. It holds the process id, so
    two processes that write the same file do not meet; the last to finish wins. Missing folders are made.

    Raises: OSError, where the folder cannot be written or the disk is full; an older `path` then stays as it was.

    Example
    -------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "notes" / "a.txt"
    >>> with whole_file(target) as unfinished:
    ...     _ = unfinished.write_text("done")
    >>> target.read_text()
    'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a new folder of that name in another place; on success what was written there is at `path`.

    Where there was no such folder, it is there whole or not at all. Into one that is there the files are moved, each
    whole, over those of the same name; others are left alone.

    Raises: OSError, where the folder cannot be written or the disk is full; an older `path` then stays as it was.

    Example
    -------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "model"
    >>> with whole_folder(target) as unfinished:
    ...     _ = (unfinished / "config.json").write_text("{}")
    >>> [path.name for path in target.iterdir()]
    ['config.json']
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        (place / path.name).mkdir(parents=True)
        yield place / path.name
        if path.exists():
            for file in sorted(file for file in (place / path.name).rglob("*") if file.is_file()):
                final = path / file.relative_to(place / path.name)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, final)
        else:
            (place / path.name).rename(path)
    finally:
        shutil.rmtree(place, ignore_errors=True)
