"""What lies in folders: training runs, evaluations, and figures of layers and lengths, each read and checked."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cald_speech.data.encodings import read_text
from cald_speech.errors import UserError
from cald_speech.evaluation.report import read_result
from cald_speech.tasks.wer import EvaluationResult

LOG = "train_log.jsonl"
# What the commands that look at layers and lengths write, and what such a file has at least.
FIGURES = {
    "drift": ("layers", "mean", "suggestion"),
    "layer_importance": ("layers", "num_layers", "teacher_wer"),
    "restoring": ("steps", "gains"),
    "by_length": ("condition", "model", "WER %", "s each"),
    "lookahead": ("lookahead", "WER %"),
}
TABLES = {"by_length", "lookahead"}  # lists of rows
# Inside a run or beside it: nothing that is shown, and maybe thousands of files.
UNSEARCHED = {"checkpoints", "data", "manifests", "model", "teacher_model", "tensorboard", "waypoints"}
DEEPEST = 4


@dataclass(frozen=True)
class Run:
    """A training run: every line of its log, every start of it, its settings as they stand in its folder."""

    folder: Path
    log: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    settings: str
    is_cut: bool  # the last line of the log is not whole


@dataclass(frozen=True)
class Evaluation:
    """A report that `write_report` left."""

    folder: Path
    split: str
    summary: dict[str, Any]
    result: EvaluationResult


@dataclass(frozen=True)
class Figure:
    """What ``<kind>.json`` holds."""

    folder: Path
    kind: str
    found: Any


@dataclass(frozen=True)
class Found:
    """Everything in the given folders, in their order."""

    runs: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def find(folders: Sequence[str | Path], split: str | None = None) -> Found:
    """Read what the folders hold, and the folders in them, four deep. Raises UserError, as `write_page`."""
    found, seen = Found(), set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: expected a folder, {_KINDS}, but there is none. Check the path")
        before, other = _count(found), 0
        for place in _places(folder):
            if place.resolve() in seen:
                other += 1
                continue
            seen.add(place.resolve())
            other += _read(place, split, found)
        if _count(found) == before and not other:
            raise UserError(f"{folder}: expected {_KINDS}, or folders with such; {_what_there_is(folder, split)}")
    if not _count(found):
        raise UserError(f"--split {split}: expected an evaluation of that name, got none. Leave it out for all")
    return found


_KINDS = (
    f"a training run ({LOG}), an evaluation (<split>.json and <split>.jsonl) or what drift, layers, by-length or "
    "lookahead wrote"
)


def _count(found: Found) -> int:
    return len(found.runs) + len(found.evaluations) + len(found.figures)


def _what_there_is(folder: Path, split: str | None) -> str:
    for path in sorted(folder.glob("*.jsonl")):
        if not path.with_suffix(".json").exists():
            return f"got {path.name} without its summary {path.stem}.json: it is not finished. Evaluate again"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    got = f"got {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}" if names else "it is empty"
    return f"{got}. Give the output folder of training, or that of `cald-speech evaluate`"


def _places(folder: Path, depth: int = 0) -> Iterator[Path]:
    yield folder
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for path in inside if depth < DEEPEST else ():
        if path.name not in UNSEARCHED and not path.name.startswith("."):
            yield from _places(path, depth + 1)


def _read(place: Path, split: str | None, found: Found) -> int:
    """Add what this one folder holds; returns how many evaluations of other splits it has."""
    other = 0
    if (place / LOG).is_file():
        found.runs.append(_run(place))
    for path in sorted(place.glob("*.json")):
        if path.stem in FIGURES:
            found.figures.append(Figure(place, path.stem, _figure(path)))
        elif path.with_suffix(".jsonl").is_file():
            summary = _json(path, "the summary of an evaluation")
            if not (isinstance(summary, dict) and {"wer", "words", "normaliser"} <= summary.keys()):
                continue  # of another program
            if split in (None, path.stem):
                found.evaluations.append(Evaluation(place, path.stem, summary, read_result(place, path.stem)))
            else:
                other += 1
    return other


def _run(folder: Path) -> Run:
    path = folder / LOG
    text = read_text(path, "the log of a run")
    *lines, rest = text.split("\n")
    log = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            steps = {name: float(value) for name, value in values.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f'{path}:{number}: expected {{"step": 10, "loss/task": 1.5, ...}}, but {error!r}. Delete this line'
            ) from error
        if "step" not in steps:
            raise UserError(f'{path}:{number}: expected {{"step": 10, ...}}, got {line:.60}. Delete this line')
        log.append(steps)
    if not log:
        raise UserError(f"{path}: expected a line for each step that was logged, got none: the run has not begun")
    starts = _json(folder / "run.json", "the starts of a run") if (folder / "run.json").is_file() else []
    if not (isinstance(starts, list) and all(isinstance(start, dict) for start in starts)):
        raise UserError(f"{folder / 'run.json'}: expected a list of the run's starts, got another. Delete it")
    settings = folder / "settings.yaml"
    text = read_text(settings, "the settings of a run") if settings.is_file() else ""
    return Run(folder, log, starts, text, is_cut=bool(rest))


def _figure(path: Path) -> Any:
    found, keys = _json(path, f"what `cald-speech` writes as {path.name}"), FIGURES[path.stem]
    rows = found if isinstance(found, list) and path.stem in TABLES else [found]
    if not rows or not all(isinstance(row, dict) and set(keys) <= row.keys() for row in rows):
        raise UserError(f"{path}: expected {', '.join(keys)} in it, got another file of that name. Measure again")
    return found


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected {what}, but it cannot be parsed ({error}). Make it again") from error
