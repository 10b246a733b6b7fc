"""What a grid's students came to: a table, and figures of WER against steps and seconds, and of layer distances."""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.evaluation.report import format_table, read_result
from cald_speech.files import whole_file
from cald_speech.recipes import SPENT
from cald_speech.recipes.grid_figures import draw_curves, draw_distances, training_seconds
from cald_speech.tasks.bootstrap import bootstrap_interval, paired_bootstrap
from cald_speech.tasks.wer import EvaluationResult

Counts = tuple[Sequence[int], Sequence[int], Sequence[Hashable] | None]
"""Errors, reference words, and the groups that a bootstrap draws of (None: each by itself)."""


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
        return [json.loads((f / SPENT).read_text()) for f in (self.before, self.folder) if f is not None]

    @property
    def result(self) -> EvaluationResult:
        """Of the test set."""
        return read_result(self.folder / "report", "test")

    @property
    def valid(self) -> list[tuple[int, float]]:
        """(step, WER of the validation set) of each validation, counted from the end of an earlier stage."""
        lines = map(json.loads, (self.folder / "train_log.jsonl").read_text().splitlines())
        return [(line["step"] + 1, line["valid/WER"]) for line in lines if "valid/WER" in line]


def by_utterance(result: EvaluationResult) -> Counts:
    """Utterances are drawn, each independent of the others."""
    return result.word_errors, result.word_counts, None


def summarise(
    students: Sequence[Student],
    output_folder: Path,
    teachers: Mapping[str, Path],
    test: Path,
    *,
    counts_of: Callable[[EvaluationResult], Counts] = by_utterance,
) -> list[dict[str, Any]]:
    """Print the table and write it to ``table.md``, draw the figures, and return the table's rows.

    ``teachers`` are output folders of trainings; with the first of them all others are compared.
    """
    results = {name: _result_of(name, folder, output_folder, test) for name, folder in teachers.items()}
    (first, folder), *_ = teachers.items()
    by_cell: dict[str, list[Student]] = {}
    for student in students:
        by_cell.setdefault(student.name, []).append(student)
    rows = [{"model": name} | _rates([result], results[first], counts_of) for name, result in results.items()]
    rows += [_row(name, of_cell, results[first], counts_of) for name, of_cell in by_cell.items()]
    table = f"{format_table(rows)}\n"
    with whole_file(output_folder / "table.md") as unfinished:
        unfinished.write_text(table)
    print(table)
    draw_curves(by_cell, output_folder / "wer.png", training_seconds(folder), results[first].words.rate)
    draw_distances(by_cell, output_folder / "distances.png")
    return rows


def _result_of(name: str, folder: Path, output_folder: Path, test: Path) -> EvaluationResult:
    report = output_folder / f"{name.replace(' ', '_')}_report"
    if not (report / "test.json").is_file():
        evaluate_folder(folder / "model", test, report, split="test", progress=False)
    return read_result(report, "test")


def _row(
    name: str, students: Sequence[Student], teacher: EvaluationResult, counts_of: Callable[[EvaluationResult], Counts]
) -> dict[str, Any]:
    return {
        "model": name,
        "valid WER %": mean(min(rate for _, rate in student.valid) for student in students),
        **_rates([student.result for student in students], teacher, counts_of),
        "seconds": mean(sum(run["seconds"] for run in student.runs) for student in students),
        "peak GiB": max(run["peak_gib"] for student in students for run in student.runs),
    }


def _rates(
    results: Sequence[EvaluationResult],
    teacher: EvaluationResult,
    counts_of: Callable[[EvaluationResult], Counts],
) -> dict[str, Any]:
    """The mean WER of the seeds with its interval, and its difference from the teacher's with the paired one."""
    rates = [result.words.rate for result in results]
    teacher_errors, counts, groups = counts_of(teacher)
    errors = np.mean([counts_of(result)[0] for result in results], axis=0)
    low, high = bootstrap_interval(errors, counts, groups=groups)
    difference, diff_low, diff_high = paired_bootstrap(errors, np.asarray(teacher_errors), counts, groups=groups)
    return {
        "WER %": mean(rates),
        "low": low,
        "high": high,
        "seeds": " ".join(f"{rate:.2f}" for rate in rates),
        "spread": max(rates) - min(rates),
        "minus teacher": difference,
        "diff low": diff_low,
        "diff high": diff_high,
        "relative %": 100 * (mean(rates) - teacher.words.rate) / teacher.words.rate if teacher.words.errors else None,
    }
