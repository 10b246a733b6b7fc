"""Figures of the grid: WER against steps and against seconds, and the distances that are left after each layer."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cald_speech.files import whole_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from cald_speech.recipes.grid_table import Student

STYLES = ("-", "--", ":", "-.")  # ten colours in each
LAST_LOGGED = 5


def training_seconds(folder: Path) -> float:
    """From a run's first logged step to its last, by the clock: pauses count."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    times = [event.wall_time for event in board.Scalars("loss/task")]
    return max(times) - min(times)


def draw_curves(by_cell: Mapping[str, Sequence["Student"]], path: Path, teacher_seconds: float, teacher: float) -> None:
    """Validation WER, the mean of the seeds, against steps and against seconds with the teacher's counted in."""
    figure, (by_steps, by_seconds) = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for number, (name, students) in enumerate(by_cell.items()):
        first = students[0]
        own = [step for step, _ in first.valid]
        rates = np.mean([[rate for _, rate in student.valid] for student in students], axis=0)
        earlier = mean(sum(run["seconds"] for run in student.runs[:-1]) for student in students)
        earlier += teacher_seconds if first.needs_teacher else 0.0
        seconds = mean(student.runs[-1]["seconds"] for student in students)
        options: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": STYLES[number // 10], "marker": "."}
        by_steps.plot([first.earlier_steps + step for step in own], rates, label=name, **options)
        by_seconds.plot([earlier + seconds * step / first.steps for step in own], rates, **options)
    by_steps.set(xlabel="student steps", ylabel="WER % of the validation set", yscale="log")
    by_seconds.set(xlabel="seconds, the teacher's fine-tuning included where there is one", xscale="log")
    figure.legend(fontsize=8, loc="outside right", title=f"teacher: {teacher:.2f} % (test)")
    _save(figure, path)


def draw_distances(by_cell: Mapping[str, Sequence["Student"]], path: Path) -> None:
    """The distance that the layer loss sees after each layer: mean of the seeds and of each one's last guided steps."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for number, (name, students) in enumerate(by_cell.items()):
        found = [last for student in students if (last := _last_distances(student.folder)) is not None]
        if found:
            options: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": STYLES[number // 10]}
            axes.plot(np.mean(found, axis=0), marker="o", label=name, **options)
    axes.set(xlabel="layer", ylabel="squared distance of the normed states", yscale="log")
    axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    figure.legend(fontsize=8, loc="outside right")
    _save(figure, path)


def _last_distances(folder: Path) -> np.ndarray | None:
    """Averaged over logged steps, since a step is one batch, and masked anew."""
    lines = map(json.loads, (folder / "train_log.jsonl").read_text().splitlines())
    found = [[v for key, v in line.items() if key.startswith("layer_distance/")] for line in lines]
    guided = [distances for distances in found if any(distances)][-LAST_LOGGED:]
    return np.mean(guided, axis=0) if guided else None


def _save(figure: plt.Figure, path: Path) -> None:
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")
    plt.close(figure)
