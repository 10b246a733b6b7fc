"""Grids of students: cells that say what each changes in one experiment, and trainings that can be stopped at any time.

A recipe's cells.py makes the cells, its compare.py trains them (`train_all`) and tabulates what came of them
(grid_table.py). A student that has ended is not trained again, one that was killed goes on from its checkpoint.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import click

from cald_speech.errors import UserError
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.recipes import train_once
from cald_speech.recipes.grid_table import Student

# Of Bidirectional, a mixer and what else is asked for.
_BOTH = "Bidirectional {{share_projections: True, chunk_size: 32, mixer: !name:cald_speech.mixers.{} {{}}{}}}"
MIXERS = {
    "mamba2": _BOTH.format("Mamba2", ""),
    "gated_linear_attention": _BOTH.format("GatedLinearAttention", ""),
    "hydra": "Hydra {chunk_size: 32}",
    "gated_delta_net": _BOTH.format("GatedDeltaNet", ""),
    "normalised": _BOTH.format("NormalisedLinearAttention", ""),
    "normalised_window_16": _BOTH.format("NormalisedLinearAttention", ", window: 16"),
    "window_16": "WindowedAttention {window: 16}",
    "mamba": _BOTH.format("Mamba", ""),
}
"""Factories by name, as a yaml names them, without the package's name."""


def grid_options(data_folder: str, output_folder: str, steps: int, counted: str = "") -> Callable:
    """The options of a script that trains a grid, with its defaults; ``counted`` says more of its steps."""
    shown = {"show_default": True}
    options = (
        click.option("--data_folder", type=Path, default=data_folder, **shown),
        click.option("--output_folder", type=Path, default=output_folder, **shown),
        click.option("--only", multiple=True, help="Cells to train, by name; default: all."),
        click.option("--seeds", default="0,1,2", **shown),
        click.option(
            "--repeat", multiple=True, help="Cells with all seeds, the others with the first alone; default: all."
        ),
        click.option("--steps", default=steps, help=f"Of each student{counted}.", **shown),
        click.option("--jobs", default=1, help="Trainings at once, one thread each.", **shown),
    )

    def with_options(main: Callable) -> Callable:
        for option in reversed(options):
            main = option(main)
        return main

    return with_options


@dataclass(frozen=True)
class Cell:
    """One student: its ``steps``, ``keys`` on top of the experiment, and the ``student`` cell that it goes on from.

    ``mixer`` is the yaml of the mixer's factory, without the package's name, and None for that of the experiment.
    """

    steps: int
    keys: Mapping[str, Any] = field(default_factory=dict)
    mixer: str | None = None
    student: str | None = None
    is_result: bool = True  # False: a stage of other cells, not a row

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher must have been fine-tuned: not where all begins with the pretrained weights."""
        return "source" in self.keys or self.keys["guidance"] not in ("unguided", "trajectory")

    def arguments(self, seed: int) -> list[str]:
        """Words for train.py, but for folders."""
        words = [f"--{key}={value}" for key, value in {"seed": seed, "num_steps": self.steps, **self.keys}.items()]
        if self.mixer is not None:
            factory = f"!name:cald_speech.mixers.{self.mixer}"
            words.append(f"--layer_map=!new:cald_speech.conversion.LayerMap {{default: {factory}}}")
        return words


def schedule(steps: int) -> str:
    """The experiments' schedule over so many steps."""
    cls = "!new:cald_speech.training.schedules.WarmupSchedule"
    return f"{cls} {{warmup_steps: 20, decay_steps: {steps - 20}, shape: cosine, floor: 0.02}}"


def guided(guidance: str, steps: int, teacher_steps: int, *keys: Mapping[str, Any], **options) -> Cell:
    """A cell of a guidance mode: hybrid switches after half of the steps; a waypoint's teacher, of ``teacher_steps``,
    goes by in them. Later ``keys`` win."""
    merged: dict[str, Any] = {"guidance": guidance, "schedule": schedule(steps)}
    merged |= {"hybrid": {"switch_step": steps // 2}, "waypoint": {"teacher_steps": teacher_steps / steps}}.get(
        guidance, {}
    )
    for more in keys:
        merged |= more
    return Cell(steps, merged, **options)


def with_stages(cells: Mapping[str, Cell], only: Sequence[str]) -> dict[str, Cell]:
    """Those of the grid that are wanted (all, if none is named), and those that they go on from, in its order.

    Raises: UserError, for a name that is none of the grid's.
    """
    unknown = [name for name in only if name not in cells]
    if unknown:
        raise UserError(f"--only: expected cells of {', '.join(cells)}, got {', '.join(unknown)}")
    named = only or list(cells)
    wanted = {*named, *(cells[name].student for name in named)}
    return {name: cell for name, cell in cells.items() if name in wanted}


@dataclass(frozen=True)
class Grid:
    """The ``cells`` of an ``experiment``; what they leave goes to ``output_folder``.

    Cells named in ``repeated`` (None: all) are trained with every seed, the others with the first alone.
    """

    experiment: str
    cells: Mapping[str, Cell]
    seeds: Sequence[int]
    data_folder: Path
    output_folder: Path
    repeated: Collection[str] | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.repeated or ()) - self.cells.keys():
            raise UserError(f"--repeat: expected cells of {', '.join(self.cells)}, got {', '.join(sorted(unknown))}")

    def seeds_of(self, name: str) -> Sequence[int]:
        """The seeds that a cell is trained with; a stage has all that any of its cells has."""
        if self.repeated is None or any(name in (one, self.cells[one].student) for one in self.repeated):
            return self.seeds
        return self.seeds[:1]

    def folder_of(self, name: str, seed: int) -> Path:
        """Where a student lives."""
        return self.output_folder / f"{name.replace(', ', '-').replace(' ', '_')}-seed{seed}"

    def train_all(self, jobs: int) -> None:
        """Train what has not ended yet, ``jobs`` at once. Raises UserError for the first that fails."""
        runs = [(name, seed) for name in self.cells for seed in self.seeds_of(name)]
        ended = {run: Event() for run in runs}

        def one(run: tuple[str, int]) -> None:
            name, seed = run
            try:
                stage = self.cells[name].student
                if stage is not None:
                    ended[stage, seed].wait()
                self.train_one(name, seed)
            finally:
                ended[run].set()

        with ThreadPoolExecutor(jobs) as pool:
            for future in [pool.submit(one, run) for run in runs]:
                future.result()

    def train_one(self, name: str, seed: int) -> None:
        """One student in a process of its own, once."""
        folder, cell = self.folder_of(name, seed), self.cells[name]
        words = [f"--data_folder={self.data_folder}", f"--output_folder={folder}", *cell.arguments(seed)]
        if cell.student is not None:
            words.append(f"--student={self.folder_of(cell.student, seed) / 'model'}")
        train_once(self.experiment, folder, words)

    def evaluated(self, test: Path) -> Iterator[Student]:
        """Every student that is a row, scored on the manifest ``test``, if it was not yet."""
        for name, cell in self.cells.items():
            for seed in self.seeds_of(name) if cell.is_result else ():
                folder = self.folder_of(name, seed)
                if not (folder / "report" / "test.json").is_file():
                    evaluate_folder(folder / "model", test, folder / "report", split="test", progress=False)
                before = None if cell.student is None else self.folder_of(cell.student, seed)
                earlier = 0 if cell.student is None else self.cells[cell.student].steps
                yield Student(name, seed, folder, before, cell.steps, earlier, cell.needs_teacher)
