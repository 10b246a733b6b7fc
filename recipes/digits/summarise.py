"""What compare.py's students came to: a table, and figures of WER against steps and seconds, and of layer distances."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from clip_bootstrap import errors_of_words
from prepare import test_strings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cald_speech.evaluation.report import format_table, read_result
from cald_speech.evaluation.run import evaluate_folder
from cald_speech.files import whole_file
from cald_speech.tasks.bootstrap import paired_bootstrap

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Student:
    """One trained student of the grid; ``before`` is the run that it went on from, ``steps`` its own."""

    name: str
    seed: int
    folder: Path
    before: Path | None
    steps: int

    @property
    def runs(self) -> list[dict[str, float]]:
        """Seconds and peak memory of its trainings."""
        return [json.loads((f / "run.json").read_text()) for f in (self.before, self.folder) if f is not None]

    @property
    def wer(self) -> float:
        """Of the test strings, in percent."""
        return read_result(self.folder / "report", "test").words.rate

    @property
    def valid(self) -> list[tuple[int, float]]:
        """(step, WER of the validation strings) of each validation, counted from the end of an earlier stage."""
        lines = map(json.loads, (self.folder / "train_log.jsonl").read_text().splitlines())
        return [(line["step"] + 1, line["valid/WER"]) for line in lines if "valid/WER" in line]

    def errors(self) -> np.ndarray:
        """Errors at each reference word of the test strings."""
        result = read_result(self.folder / "report", "test")
        return np.array([e for utterance in result.utterances for e in errors_of_words(utterance)])


def summarise(students: Sequence[Student], output_folder: Path, teacher: Path, test: Path) -> list[dict[str, Any]]:
    """Print the table and write it to ``table.md``, draw the figures, and return the table's rows."""
    if not (output_folder / "teacher_report" / "test.json").is_file():
        evaluate_folder(teacher / "model", test, output_folder / "teacher_report", split="test", progress=False)
    result = read_result(output_folder / "teacher_report", "test")
    teacher_errors = np.array([e for utterance in result.utterances for e in errors_of_words(utterance)])
    clips = [clip for utterance in result.utterances for clip in test_strings()[utterance.id].clips]
    by_cell: dict[str, list[Student]] = {}
    for student in students:
        by_cell.setdefault(student.name, []).append(student)
    rows = [_row(name, of_cell, result.words.rate, teacher_errors, clips) for name, of_cell in by_cell.items()]
    table = f"teacher: {result.words.rate:.2f} %\n\n{format_table(rows)}\n"
    with whole_file(output_folder / "table.md") as unfinished:
        unfinished.write_text(table)
    print(table)
    _draw_curves(by_cell, output_folder / "wer.png", training_seconds(teacher), result.words.rate)
    _draw_distances(by_cell, output_folder / "distances.png")
    return rows


def _row(
    name: str, students: Sequence[Student], teacher: float, teacher_errors: np.ndarray, clips: Sequence[str]
) -> dict[str, Any]:
    rates = [student.wer for student in students]
    errors = np.mean([student.errors() for student in students], axis=0)
    difference, low, high = paired_bootstrap(errors, teacher_errors, np.ones(len(clips), int), groups=clips)
    return {
        "student": name,
        "valid WER %": mean(min(rate for _, rate in student.valid) for student in students),
        "WER %": mean(rates),
        "seeds": " ".join(f"{rate:.2f}" for rate in rates),
        "spread": max(rates) - min(rates),
        "minus teacher": difference,
        "low": low,
        "high": high,
        "relative %": 100 * (mean(rates) - teacher) / teacher if teacher else None,
        "seconds": mean(sum(run["seconds"] for run in student.runs) for student in students),
        "peak GiB": max(run["peak_gib"] for student in students for run in student.runs),
    }


def training_seconds(folder: Path) -> float:
    """From a run's first logged step to its last, by the clock: pauses count."""
    times = [event.wall_time for event in _events(folder, "loss/task")]
    return max(times) - min(times)


def _events(folder: Path, tag: str) -> Sequence[Any]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return board.Scalars(tag)


def _draw_curves(by_cell: Mapping[str, Sequence[Student]], path: Path, teacher_seconds: float, teacher: float) -> None:
    """Validation WER, the mean of the seeds, against steps and against seconds with the teacher's counted in."""
    figure, (by_steps, by_seconds) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for name, students in by_cell.items():
        steps = [step for step, _ in students[0].valid]
        rates = np.mean([[rate for _, rate in student.valid] for student in students], axis=0)
        earlier = mean(sum(run["seconds"] for run in student.runs[:-1]) for student in students)
        own = mean(student.runs[-1]["seconds"] for student in students)
        if not name.startswith("unguided"):
            earlier += teacher_seconds
        by_steps.plot(steps, rates, marker=".", label=name)
        by_seconds.plot([earlier + own * step / students[0].steps for step in steps], rates, marker=".")
    by_steps.set(xlabel="student steps", ylabel="WER % of the validation strings", yscale="log")
    by_seconds.set(xlabel="seconds, the teacher's fine-tuning included where one is followed")
    by_steps.legend(fontsize=7, title=f"teacher: {teacher:.2f} % (test)")
    _save(figure, path)


def _draw_distances(by_cell: Mapping[str, Sequence[Student]], path: Path) -> None:
    """The distance that the layer loss sees after each layer, at the last logged step under guidance."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, students in by_cell.items():
        found = [last for student in students if (last := _last_distances(student)) is not None]
        if found:
            axes.plot(np.mean(found, axis=0), marker="o", label=name)
    axes.set(xlabel="layer", ylabel="squared distance of the normed states", yscale="log", xticks=range(4))
    axes.legend(fontsize=7)
    _save(figure, path)


def _last_distances(student: Student) -> list[float] | None:
    lines: Iterable = map(json.loads, (student.folder / "train_log.jsonl").read_text().splitlines())
    found = [[v for key, v in line.items() if key.startswith("layer_distance/")] for line in lines]
    return next((distances for distances in reversed(found) if any(distances)), None)


def _save(figure: plt.Figure, path: Path) -> None:
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    plt.close(figure)
