"""Files and folders that are either whole or absent: a killed run never leaves half of one behind."""

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


class InUse(OSError):
    """Another process holds the folder; the message is for the user."""


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


def sweep(folder: str | Path, *, older_than_s: float = 0.0) -> None:
    """Remove, at any depth, the temporary files and folders of processes that were killed.

    Arguments
    ---------
    older_than_s : leaves younger ones; where processes of other machines write to the folder too, theirs seem gone.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / ".train.99999999.json").touch()  # there is no such process
    >>> sweep(folder)
    >>> list(folder.iterdir())
    []
    """
    newest = time.time() - older_than_s
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            named = re.fullmatch(r"\..+\.(\d+)(\.[^.]*)?", name)
            path = Path(place, name)
            if named and not _is_running(int(named[1])) and path.lstat().st_mtime <= newest:
                shutil.rmtree(path) if name in folders else path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder, which is made if it is missing, against other processes, of other machines too.

    The lock ends with the process, however that ends. Processes that are forked inside do not have it.

    Raises: InUse, where another process holds it, with its number and machine; OSError, where the folder cannot be
    written. A file system without locks is not held.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with locked(folder):
    ...     [path.name for path in folder.iterdir()]
    ['.lock']
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Not flock(): workers that are forked inside would hold that beyond the end of a killed process.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = _holder(handle)
            os.close(handle)
            raise InUse(
                f"{folder} is in use by another process{holder}: wait for it or end it, or choose another folder"
            ) from error
        except OSError:
            os.close(handle)
            handle = None  # no locks here
            break
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            break
        os.close(handle)  # whoever had it removed the file in between
    try:
        if handle is not None:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _holder(handle: int) -> str:
    try:
        known = json.loads(os.pread(handle, 1000, 0))
        return f" (process {known['pid']} on {known['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
