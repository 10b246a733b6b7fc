"""The recipes as modules: ``cald_speech.recipes.librispeech.prepare`` is recipes/librispeech/prepare.py.

In a checkout they lie in its top-level folder ``recipes``; where the package was installed, they lie in here. Any
number of them can be used in one process, and one can use another.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cald_speech.errors import UserError
from cald_speech.files import whole_file
from cald_speech.shipped import recipes_folder

__path__ = [str(recipes_folder())]

SPENT = "spent.json"
"""What a training took, beside its model once it has ended: run.json is there from its start."""


def commit() -> str:
    """Of this checkout, with a mark where files were changed since; empty where there is none."""
    asked = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, cwd=recipes_folder().parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def stamped(folder: Path) -> str:
    """The commit at which the training in a folder began, written down there once."""
    path = folder / "commit.txt"
    if not path.is_file():
        with whole_file(path) as unfinished:
            unfinished.write_text(commit() + "\n")
    return path.read_text().strip()


class Spent(NamedTuple):
    """What a training took: seconds by the clock, and the most memory it had."""

    seconds: float
    peak_gib: float


def train_apart(experiment: str | Path, folder: Path, words: Sequence[str]) -> Spent:
    """Train an experiment in a process of its own, on one thread: several can run side by side.

    ``words`` are keys as on the command line, ``--seed=1``. What the training says is added to ``folder``/log.txt.

    Raises: UserError, where it fails.
    """
    start = [sys.executable, "-c", "from cald_speech.commands import main; main()", "train", str(experiment)]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(folder / "log.txt", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*start, *words, "--noprogressbar"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"the training of {folder.name} failed; see {folder / 'log.txt'}")
    return Spent(time.perf_counter() - began, usage.ru_maxrss / 2**20)


def train_once(experiment: str | Path, folder: Path, words: Sequence[str]) -> None:
    """`train_apart`, unless it has ended before; what it took stays in ``folder``/spent.json."""
    if (folder / SPENT).is_file():
        return
    spent = train_apart(experiment, folder, words)
    with whole_file(folder / SPENT) as unfinished:
        unfinished.write_text(json.dumps(spent._asdict()))
    print(f"{folder.name}: {spent.seconds:.0f} s", flush=True)
