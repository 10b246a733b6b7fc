"""The grid of guidance modes, starts and mixers on real digits, three seeds each, at equal steps (cells.py).

    python recipes/digits/compare.py --jobs 2

Stopped and started again, it goes on where it was: a student that has ended is not trained again, one that was killed
goes on from its checkpoint. Results and figures go to results/digits/grid; the last line is one JSON list.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import click

from cald_speech.commands.options import command
from cald_speech.errors import UserError
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.files import whole_file
from cald_speech.recipes import train_apart
from cald_speech.recipes.digits.cells import Cell, make_cells
from cald_speech.recipes.digits.prepare import prepare
from cald_speech.recipes.digits.summarise import Student, summarise


@command()
@click.option("--data_folder", type=Path, default="data/fsdd", show_default=True)
@click.option("--output_folder", type=Path, default="results/digits/grid", show_default=True)
@click.option("--only", multiple=True, help="Cells to train, by name; default: all.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--steps", default=200, show_default=True, help="Of each student, the stages before it counted in.")
@click.option("--jobs", default=1, show_default=True, help="Trainings at once, one thread each.")
def main(data_folder: Path, output_folder: Path, only: Sequence[str], seeds: str, steps: int, jobs: int) -> None:
    """Train and compare the cells of the grid."""
    cells = _with_stages(make_cells(steps), only)
    numbers = [int(seed) for seed in seeds.split(",")]
    prepare(data_folder, Path("results/digits/data"))  # not twice at once, by the first trainings
    prepare(data_folder, Path("results/digits/data_hundredth"), num_train=80)
    if any("transcripts_of" in cell.keys.get("corpus", "") for cell in cells.values()):
        prepare(data_folder, Path("results/digits/data"), transcripts_of="results/digits/teacher/model")
    train_all(cells, numbers, data_folder, output_folder, jobs)
    test = prepare(data_folder, Path("results/digits/data"))["test"]
    students = list(_evaluated(cells, numbers, output_folder, test))
    print(json.dumps(summarise(students, output_folder, Path("results/digits/teacher"), test)))


def _with_stages(cells: Mapping[str, Cell], only: Sequence[str]) -> dict[str, Cell]:
    """Those of the grid that are wanted (all, if none is named), and those that they go on from, in its order."""
    unknown = [name for name in only if name not in cells]
    if unknown:
        raise UserError(f"--only: expected cells of {', '.join(cells)}, got {', '.join(unknown)}")
    named = only or list(cells)
    wanted = {*named, *(cells[name].student for name in named)}
    return {name: cell for name, cell in cells.items() if name in wanted}


def train_all(
    cells: Mapping[str, Cell], seeds: Sequence[int], data_folder: Path, output_folder: Path, jobs: int
) -> None:
    """Train what has not ended yet, ``jobs`` at once. Raises UserError for the first that fails."""
    runs = [(name, seed) for name in cells for seed in seeds]
    ended = {run: Event() for run in runs}

    def one(run: tuple[str, int]) -> None:
        name, seed = run
        try:
            stage = cells[name].student
            if stage is not None:
                ended[stage, seed].wait()
            train_one(name, cells[name], seed, data_folder, output_folder)
        finally:
            ended[run].set()

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(one, run) for run in runs]:
            future.result()


def train_one(name: str, cell: Cell, seed: int, data_folder: Path, output_folder: Path) -> None:
    """One student in a process of its own; its time and memory go to ``run.json``, which says that it has ended."""
    folder = folder_of(output_folder, name, seed)
    if (folder / "run.json").is_file():
        return
    words = [f"--data_folder={data_folder}", f"--output_folder={folder}", *cell.arguments(seed)]
    spent = train_apart("hparams/digits/grid.yaml", folder, [*words, *_start(cell, seed, output_folder)])
    with whole_file(folder / "run.json") as unfinished:
        unfinished.write_text(json.dumps(spent._asdict()))
    print(f"{name}, seed {seed}: {spent.seconds:.0f} s", flush=True)


def _start(cell: Cell, seed: int, output_folder: Path) -> list[str]:
    return [] if cell.student is None else [f"--student={folder_of(output_folder, cell.student, seed) / 'model'}"]


def folder_of(output_folder: Path, name: str, seed: int) -> Path:
    """Where a student lives."""
    return output_folder / f"{name.replace(', ', '-').replace(' ', '_')}-seed{seed}"


def _evaluated(cells: Mapping[str, Cell], seeds: Sequence[int], output_folder: Path, test: Path) -> Iterator[Student]:
    for name, cell in cells.items():
        for seed in seeds if cell.is_result else ():
            folder = folder_of(output_folder, name, seed)
            if not (folder / "report").is_dir():
                evaluate_folder(folder / "model", test, folder / "report", split="test", progress=False)
            before = None if cell.student is None else folder_of(output_folder, cell.student, seed)
            earlier = 0 if cell.student is None else cells[cell.student].steps
            yield Student(name, seed, folder, before, cell.steps, earlier, cell.needs_teacher)


if __name__ == "__main__":
    main()
