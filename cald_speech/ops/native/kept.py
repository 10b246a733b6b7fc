"""The compiled kernels on disk: in a folder that is this user's alone, beside a digest of what was compiled.

A library is code that runs in this process, and one that was cut off ends the process where it is touched. So nothing
is loaded that another user could have put there, nor anything but what was compiled, to the last byte.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = "compiling-"  # folders of compilations that run, or were killed


class NotBuilt(RuntimeError):
    """The compiled kernels cannot be had here; the message says why and what would help."""


def cache_folder() -> Path:
    """Where compiled kernels are kept. Raises :class:`NotBuilt` where others could write there, or nobody can."""
    try:
        if chosen := os.environ.get("CALD_SPEECH_CACHE"):
            folder = Path(chosen).expanduser()
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cald_speech"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve(strict=True)
        reason = why_not_ours(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise NotBuilt(f"It has nowhere to be kept ({error}): set CALD_SPEECH_CACHE to a folder.") from error
    if reason:
        raise NotBuilt(
            f"It is not kept in {folder}, which {reason}: whoever writes there runs code as you. Make it yours "
            f"(chmod 700 {folder}) once you know what is in it, or set CALD_SPEECH_CACHE to a folder of your own."
        )
    return folder


def why_not_ours(path: Path) -> str | None:
    """Who else could have written to it, or None.

    Example
    -------
    >>> why_not_ours(Path(__file__).parent) is None or os.geteuid() != Path(__file__).stat().st_uid
    True
    """
    status = path.stat()
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid} and not to {os.geteuid()}"
    return "others than its owner may write to" if status.st_mode & 0o022 else None


def damage(path: Path) -> str | None:
    """Why a library is not to be loaded, or None where it is what was compiled."""
    if not path.exists():
        return "is not there"
    if reason := why_not_ours(path):
        return reason
    try:
        expected = digest_file(path).read_text()
    except (OSError, UnicodeDecodeError):
        return "has no digest beside it"
    return None if expected == digest_of(path) else "is not what was compiled: its digest is another"


def keep(made: Path, path: Path) -> None:
    """Move what was compiled to ``path``, synced, and last its digest: a crash in between leaves none, or another's."""
    made.chmod(0o700)
    digest = made.with_suffix(".sha256")
    digest.write_text(digest_of(made))
    for file, final in ((made, path), (digest, digest_file(path))):
        sync(file)
        os.replace(file, final)
    sync(path.parent)


def digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def compiling_alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; it removes what killed ones have left."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError:
            pass
        else:
            _remove_left(folder)
        yield
    finally:
        os.close(opened)


def tidy(folder: Path) -> None:
    """Remove what killed compilations have left, unless one runs."""
    if not any(folder.glob(f"{UNFINISHED}*")):
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_left(folder)
    except OSError:  # one runs, or the file system has no locks
        return
    finally:
        os.close(opened)


def _remove_left(folder: Path) -> None:
    for left in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
