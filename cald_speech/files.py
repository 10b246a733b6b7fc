"""Files and folders that are either whole or absent, however a run ends: kills were tried, power cuts were not.

What gets its final name is on the disk before, and the name after it. What a killed process leaves is a name that says
so, ``.a.<process>.unfinished.txt``, until :func:`sweep`; what two processes could mix, :func:`locked` gives to one.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LONGEST_NAME = 255  # bytes, of most file systems
POINTER = b"version https://git-lfs.github.com/spec/"

LEFT = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>unfinished|old)(\.[^.]*)?")
# What these raise for a file system that has no such call, or a folder that is no ordinary one.
NOT_HERE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBUSY, errno.EXDEV, errno.EPERM, errno.ENOTTY}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_loaded_at = time.time()
_held: set[tuple[int, Path]] = set()  # locks of this process, by its number: a forked one does not have them


class InUse(OSError):
    """Another process holds the folder; the message is for the user."""


@contextmanager
def whole_file(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary name in the folder of `path`; on success the file written there becomes `path`.

    The temporary name ends like `path`, because soundfile chooses a format by the ending. It holds the process id, so
    two processes that write the same file do not meet; the last to finish wins. Missing folders are made.

    Arguments
    ---------
    durable : False, for thousands of files, leaves it to :func:`settle` that they outlast a power cut.

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
    ending = f".{os.getpid()}.unfinished{path.suffix}"
    unfinished = path.with_name(f".{short_name(path.stem, LONGEST_NAME - 1 - len(os.fsencode(ending)))}{ending}")
    try:
        yield unfinished
        put(unfinished, path) if durable else os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path, *, keep_others: bool = False, last: str = "config.json") -> Iterator[Path]:
    """Give a new folder of that name in another place; on success what was written there is at `path`.

    Whenever the process is killed, `path` is the old folder or the new one, whole. Where a file system cannot exchange
    folders there is a moment with neither; :func:`sweep` and the next such call bring the old one back. Where `path` is
    a mount point or the working folder, files are moved into it one by one, and until the end it lacks `last`.

    Arguments
    ---------
    keep_others : True keeps files of the old folder that the new one does not have.
    last : the file without which such a folder is none.

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
    path = Path(path).resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path)
    place = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    made = place / path.name
    try:
        made.mkdir(parents=True)
        yield made
        if not path.exists():
            put(made, path)
            return
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        if keep_others:
            shutil.copytree(path, made, symlinks=True, copy_function=_link_unless_there, dirs_exist_ok=True)
        shutil.copymode(path, made)
        _sync_all(made)
        if not (_exchanged(made, path) or _replaced(made, path)):
            _move_into(made, path, last)
        sync(path.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def short_name(name: str, most: int) -> str:
    """A name of at most so many bytes; of a longer one the beginning, and what tells it from others that begin so.

    Example
    -------
    >>> short_name("a" * 300, 40), short_name("talk", 40)
    ('aaaaaaaaaaaaaaaaaaaaaaa-9835fa6bf4e20a9b', 'talk')
    """
    encoded = os.fsencode(name)
    if len(encoded) <= most:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded[: most - 17].decode('utf-8', 'ignore')}-{digest}"


def from_home(path: str) -> str:
    """A path in which ``~/`` is the user's home, as a shell has it; of a yaml, and behind ``=``, no shell has seen it.

    Example
    -------
    >>> from_home("a/~/b"), from_home("~/a") == str(Path.home() / "a")
    ('a/~/b', True)
    """
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path


def is_pointer(path: str | Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of a large one, where it is not installed."""
    with open(path, "rb") as file:
        return file.read(len(POINTER)) == POINTER


def put(made: Path, path: Path) -> None:
    """Give a whole file or folder its final name, once it is on the disk.

    Raises: OSError, where the disk is full; some file systems say so only here.
    """
    _sync_all(made)
    os.replace(made, path)
    sync(path.parent)


def settle() -> None:
    """Have all on the disk that was written, before the record that says so: one call for thousands of files."""
    os.sync()


def sync(path: Path) -> None:
    """Have a file's content on the disk, or a folder's names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
    finally:
        os.close(opened)


def _sync_all(made: Path) -> None:
    for place, _, files in os.walk(made):
        for file in files:
            if not os.path.islink(os.path.join(place, file)):
                sync(Path(place, file))
        sync(Path(place))
    if not made.is_dir():
        sync(made)


def _link_unless_there(old: str, new: str) -> None:
    """The same file under a second name: it is nowhere missing, whenever the process is killed."""
    if os.path.lexists(new):
        return
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


@cache
def _renameat2() -> Any:
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _exchanged(made: Path, path: Path) -> bool:
    """Whether the two folders have one another's names now, which happens at once or not at all."""
    call = _renameat2()
    if call is None or _is_working_folder(path):
        return False
    if call(_AT_FDCWD, os.fsencode(made), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_HERE:
        return False
    raise OSError(number, os.strerror(number), str(path))


def _replaced(made: Path, path: Path) -> bool:
    """The same by two renames. The old folder has a name in between by which it is brought back."""
    if _is_working_folder(path):
        return False
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.rename(old)
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
        return False
    try:
        made.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return True


def _move_into(made: Path, path: Path, last: str) -> None:
    (path / last).unlink(missing_ok=True)
    files = sorted((file for file in made.rglob("*") if not file.is_dir()), key=lambda file: file.name == last)
    for file in files:
        final = path / file.relative_to(made)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, final)


def _is_working_folder(path: Path) -> bool:
    """Exchanged, it would be another folder, and the user's shell in one that is gone."""
    return Path.cwd().is_relative_to(path)


def sweep(folder: str | Path, *, older_than_s: float = 0.0) -> None:
    """Remove, at any depth, the temporary files and folders of processes that were killed.

    Arguments
    ---------
    older_than_s : leaves younger ones; where processes of other machines write to the folder too, theirs seem gone.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / ".train.99999999.unfinished.json").touch()  # there is no such process
    >>> sweep(folder)
    >>> list(folder.iterdir())
    []
    """
    newest = time.time() - older_than_s
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            _clear(Path(place, name), newest)


def clear(path: str | Path) -> None:
    """The same of one file or folder, or of all that are called ``path`` and an ending."""
    for left in Path(path).parent.glob(f".{_literal(Path(path).stem)}.*"):
        _clear(left, newest=time.time())


def _clear(path: Path, newest: float) -> None:
    """Remove what a killed process has left, or bring back the folder that it had put aside."""
    left = LEFT.fullmatch(path.name)
    try:
        if not left or path.lstat().st_mtime > newest or _is_running(int(left["process"]), path):
            return
        final = path.with_name(left["name"])
        if left["kind"] == "old" and not final.exists():
            path.rename(final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except FileNotFoundError:  # its process goes on after all, on another machine, or another one sweeps
        return


def _is_running(process: int, path: Path) -> bool:
    """Whether the process that made `path` is there. In containers the next one often has the same number."""
    if process == os.getpid():
        return path.lstat().st_mtime >= _loaded_at
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextmanager
def locked(folder: str | Path, name: str = "", *, wait: bool = False) -> Iterator[None]:
    """Hold a folder, which is made if it is missing, against other processes, of other machines too.

    The lock ends with the process, however that ends. Processes that are forked inside do not have it; the process
    itself may take it again.

    Arguments
    ---------
    name : of what is held in the folder, where that is not all of it.
    wait : until the other process is done, instead of an error.

    Raises: InUse, where another process holds it, with its number and machine; OSError, where the folder cannot be
    written. A file system without locks is not held.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with locked(folder, "test"):
    ...     [path.name for path in folder.iterdir()]
    ['.test.lock']
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder).resolve() / (f".{name}.lock" if name else ".lock")
    mine = os.getpid(), path
    if mine in _held:
        yield
        return
    handle = _take(path, Path(folder) / name, wait=wait)
    try:
        _held.add(mine)
        if handle is not None:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        _held.discard(mine)
        path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def once(folder: str | Path, name: str, is_made: Callable[[], bool], make: Callable[[], object]) -> None:
    """Make what is called ``name`` in a folder unless it is made; processes that come meanwhile wait, and find it so.

    Raises: OSError, as `locked`.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for _ in range(2):
    ...     once(folder, "a", (folder / "a").exists, lambda: print("made") or (folder / "a").touch())
    made
    """
    if is_made():
        if (Path(folder) / f".{name}.lock").exists():  # of a process that was killed when it had made it
            with suppress(OSError), locked(folder, name):
                pass
        return
    with locked(folder, name, wait=True):
        if not is_made():
            make()


def _take(path: Path, what: Path, *, wait: bool) -> int | None:
    """The file of the lock, opened, once it is this process's; None where there are no locks."""
    block = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Not flock(): workers that are forked inside would hold that beyond the end of a killed process.
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError) as error:
            holder = _holder(handle)
            os.close(handle)
            if wait:
                logger.info("%s is in use by another process%s: waiting for it", what, holder)
                block = True
                continue
            raise InUse(
                f"{what} is in use by another process{holder}: wait for it or end it, or choose another folder"
            ) from error
        except OSError:
            os.close(handle)
            return None
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            return handle
        os.close(handle)  # whoever had it removed the file in between


def _holder(handle: int) -> str:
    try:
        known = json.loads(os.pread(handle, 1000, 0))
        return f" (process {known['pid']} on {known['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
