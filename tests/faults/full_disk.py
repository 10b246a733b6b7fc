"""Commands on a disk that is full at some point: one sentence, nothing half; with more room the same ends well.

The disk is a small file system in memory where this process may mount one; else no file grows past some size.
"""

import math
import os
import random
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from cald_speech.errors import UserError
from tests.faults.kills import LIMIT_S, Job, call, check_whole, different, files_in, jobs, to_its_end, undisturbed

PAGE = 4096
SPARE = 2**26


@contextmanager
def disk(folder: Path) -> Iterator[Callable[[int | None], None]]:
    """A file system of its own at ``folder``; called with a number it has so many bytes left, with None enough."""
    folder.mkdir()
    _mount(folder, "size=64m")

    def leave(room: int | None) -> None:
        status = os.statvfs(folder)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        _mount(folder, f"remount,size={SPARE if room is None else max(PAGE, used + room)}")

    try:
        yield leave
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True, capture_output=True)


@cache
def may_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def full_disk(rng: random.Random, folder: Path) -> None:
    name = rng.choice(sorted(jobs()))
    job, target = jobs()[name], folder / "disk"
    before, after, _, _ = undisturbed(name)
    new = [math.ceil(len(content) / PAGE) * PAGE for file, content in after.items() if before.get(file) != content]
    if may_mount():
        room = rng.randrange(sum(new) + 2 * PAGE)
        with disk(target) as leave:
            job.set_up(target)
            leave(room)
            said = _refused(job, target)
            check_whole(job, target, before, after, f"{name} with {room} bytes left")
            leave(None)
            to_its_end(job, target)
            wrong = different(files_in(job, target), after)
    else:
        target.mkdir()
        room = rng.randrange(max(new))
        job.set_up(target)
        said = _refused(replace(job, call=lambda place: _limited(job, room, place)), target)
        check_whole(job, target, before, after, f"{name} with no file past {room} bytes")
        to_its_end(job, target)
        wrong = different(files_in(job, target), after)
    assert not wrong, f"{name} with {room} bytes left, and called again: {', '.join(wrong)}"
    if said is not None:
        raise UserError(said)


def _refused(job: Job, folder: Path) -> str | None:
    """What it said where it did not end well; that is one paragraph."""
    status, _, text = call(job, folder)
    if status == 0:
        return None
    told = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status in (1, 2) and told and "Traceback" not in text, f"status {status}: {text}"
    return told[-1]


def _limited(job: Job, room: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    job.call(folder)


full_disk.limit_s = LIMIT_S
GENERATORS = {"full disks": full_disk}
