"""What compare.py's students came to: a table, and figures of WER against steps and seconds, and of layer distances."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.evaluation.report import format_table, read_result
from cald_speech.files import whole_file
from cald_speech.recipes.digits.clip_bootstrap import errors_of_words
from cald_speech.recipes.digits.grid_figures import draw_curves, draw_distances, training_seconds
from cald_speech.recipes.digits.prepare import test_strings
from cald_speech.tasks.bootstrap import paired_bootstrap


@dataclass(frozen=True)
class Student:
    """One trained student of the grid; ``before`` is the run that it went on from, of ``earlier_steps``.

    ``needs_teacher`` says that the teacher had to be fine-tuned first.
    """

    name: str
    seed: int
    folder: Path
    before: Path | None
    steps: int
    earlier_steps: int = 0
    needs_teacher: bool = True

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
    draw_curves(by_cell, output_folder / "wer.png", training_seconds(teacher), result.words.rate)
    draw_distances(by_cell, output_folder / "distances.png")
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
