"""The grid of guidance modes, starts and mixers on real digits, three seeds each, at equal steps (cells.py).

    python recipes/digits/compare.py --data_folder ../shared/data/fsdd --jobs 2

Stopped and started again, it goes on where it was: a student that has ended is not trained again, one that was killed
goes on from its checkpoint. Results and figures go to results/digits/grid; the last line is one JSON list.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import click
from cells import CELLS, Cell
from prepare import prepare
from summarise import Student, summarise

from cald_speech.errors import UserError
from cald_speech.evaluation.run import evaluate_folder
from cald_speech.files import whole_file

ROOT = Path(__file__).resolve().parents[2]


@click.command()
@click.option("--data_folder", type=Path, default="data/fsdd", show_default=True)
@click.option("--output_folder", type=Path, default="results/digits/grid", show_default=True)
@click.option("--only", multiple=True, help="Cells to train, by name; default: all.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--jobs", default=1, show_default=True, help="Trainings at once, one thread each.")
def main(data_folder: Path, output_folder: Path, only: Sequence[str], seeds: str, jobs: int) -> None:
    """Train and compare the cells of the grid."""
    try:
        names = _with_stages(only or CELLS)
        numbers = [int(seed) for seed in seeds.split(",")]
        prepare(data_folder, Path("results/digits/data"))  # not twice at once, by the first trainings
        prepare(data_folder, Path("results/digits/data_hundredth"), num_train=80)
        train_all([(name, seed) for name in names for seed in numbers], data_folder, output_folder, jobs)
        test = prepare(data_folder, Path("results/digits/data"))["test"]
        students = list(_evaluated(names, numbers, output_folder, test))
        print(json.dumps(summarise(students, output_folder, Path("results/digits/teacher"), test)))
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


def _with_stages(names: Sequence[str]) -> list[str]:
    """The cells in the grid's order, with those that others go on from before them."""
    unknown = [name for name in names if name not in CELLS]
    if unknown:
        raise UserError(f"--only: expected cells of {', '.join(CELLS)}, got {', '.join(unknown)}")
    wanted = {*names, *(CELLS[name].student for name in names)}
    return [name for name in CELLS if name in wanted]


def train_all(runs: Sequence[tuple[str, int]], data_folder: Path, output_folder: Path, jobs: int) -> None:
    """Train what has not ended yet, ``jobs`` at once. Raises UserError for the first that fails."""
    ended = {run: Event() for run in runs}

    def one(run: tuple[str, int]) -> None:
        name, seed = run
        try:
            stage = CELLS[name].student
            if stage is not None:
                ended[stage, seed].wait()
            train_one(name, seed, data_folder, output_folder)
        finally:
            ended[run].set()

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, run) for run in runs]
        for future in futures:
            future.result()


def train_one(name: str, seed: int, data_folder: Path, output_folder: Path) -> None:
    """One student in a process of its own; its time and memory go to ``run.json``, which says that it has ended."""
    cell, folder = CELLS[name], folder_of(output_folder, name, seed)
    if (folder / "run.json").is_file():
        return
    words = [sys.executable, "recipes/digits/train.py", "hparams/digits_grid.yaml", f"--data_folder={data_folder}"]
    words += [f"--output_folder={folder}", "--noprogressbar", *cell.arguments(seed), *_start(cell, seed, output_folder)]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise UserError(f"the training of {name!r}, seed {seed}, failed; see {folder / 'log.txt'}")
    with whole_file(folder / "run.json") as unfinished:
        unfinished.write_text(json.dumps({"seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20}))
    print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)


def _start(cell: Cell, seed: int, output_folder: Path) -> list[str]:
    return [] if cell.student is None else [f"--student={folder_of(output_folder, cell.student, seed) / 'model'}"]


def folder_of(output_folder: Path, name: str, seed: int) -> Path:
    """Where a student lives."""
    return output_folder / f"{name.replace(', ', '-').replace(' ', '_')}-seed{seed}"


def _evaluated(names: Sequence[str], seeds: Sequence[int], output_folder: Path, test: Path) -> Iterator[Student]:
    for name in names:
        for seed in seeds if CELLS[name].is_result else ():
            folder = folder_of(output_folder, name, seed)
            if not (folder / "report").is_dir():
                evaluate_folder(folder / "model", test, folder / "report", split="test", progress=False)
            stage = CELLS[name].student
            before = None if stage is None else folder_of(output_folder, stage, seed)
            yield Student(name, seed, folder, before, CELLS[name].steps)


if __name__ == "__main__":
    main()
