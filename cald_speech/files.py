"""Files that are either whole or absent: a killed run never leaves half of one behind."""

import os
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
