"""What an evaluation leaves behind: a summary and every utterance's edits, so that each figure can be checked."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cald_speech.conversion.int8 import count_parameters
from cald_speech.data.encodings import read_text
from cald_speech.errors import UserError
from cald_speech.files import whole_file
from cald_speech.tasks.wer import EvaluationResult, Score, Utterance, compare


def write_report(
    folder: str | Path,
    result: EvaluationResult,
    *,
    manifest_hash: str,
    normaliser: str,
    model: str,
    decoder: str,
    split: str,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `<split>.jsonl`, one line for each utterance, then `<split>.json`, the summary, which is also returned.

    Rates and their interval (95 %, bootstrap over utterances) are in percent; `extra` is added to the summary. Each
    file is whole or absent, and the summary comes last: where it stands, the utterances beside it are those it sums up.

    Raises
    ------
    UserError
        where the folder cannot be written.
    ValueError
        where `split` is not a plain name or `extra` has a key of the summary's own.

    Example
    -------
    >>> import tempfile
    >>> from cald_speech.tasks.wer import score
    >>> result = score({"a": "one two"}, {"a": "one too"}, durations_s={"a": 1.5})
    >>> about = {"manifest_hash": "0f", "normaliser": "librispeech", "model": "folder", "decoder": "greedy"}
    >>> summary = write_report(tempfile.mkdtemp(), result, split="test", **about)
    >>> summary["wer"], summary["words"]["substitutions"], summary["audio_s"]
    (50.0, 1, 1.5)
    """
    if not split or Path(split).name != split:
        raise ValueError(f"split: expected a plain name such as 'test-clean', got {split!r}")
    summary = {
        "split": split,
        "model": model,
        "decoder": decoder,
        "normaliser": normaliser,
        "manifest_hash": manifest_hash,
        **_figures(result),
    }
    clash = sorted(summary.keys() & (extra or {}).keys())
    if clash:
        raise ValueError(f"extra: expected keys that the summary lacks, got {clash}")
    summary.update(extra or {})
    lines = "".join(json.dumps(asdict(utterance), ensure_ascii=False) + "\n" for utterance in result.utterances)
    folder = Path(folder)
    try:
        (folder / f"{split}.json").unlink(missing_ok=True)  # it would not sum up the new utterances
        with whole_file(folder / f"{split}.jsonl") as unfinished:
            unfinished.write_text(lines, encoding="utf-8")
        with whole_file(folder / f"{split}.json") as unfinished:
            unfinished.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder}: the report could not be written ({error.strerror}). Make room or choose another folder, and "
            f"evaluate again; WER {summary['wer']} %, CER {summary['cer']} %."
        ) from error
    return summary


def run_facts(model: nn.Module, device: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """How a summary's figures were come by, for its ``extra``.

    Example
    -------
    >>> run_facts(nn.Linear(2, 3), "cpu", torch.float32, 1.234)
    {'parameters': 9, 'device': 'cpu', 'dtype': 'float32', 'seconds': 1.23}
    """
    return {
        "parameters": count_parameters(model),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(seconds, 2),
    }


def read_result(folder: str | Path, split: str) -> EvaluationResult:
    """The utterances of a report that `write_report` left, for comparing two models: `compare(read_result(...), ...)`.

    Raises
    ------
    UserError
        where there is no whole report of that split.
    """
    folder = Path(folder)
    if not (folder / f"{split}.json").is_file():
        raise UserError(f"{folder}: expected a report of {split!r} ({split}.json and {split}.jsonl): evaluate first.")
    path, scores = folder / f"{split}.jsonl", ("words", "characters")
    try:
        # A text may hold what else Python takes for the end of a line.
        rows = [json.loads(line) for line in read_text(path, "a report").split("\n") if line]
        return EvaluationResult([Utterance(**{**row, **{key: Score(**row[key]) for key in scores}}) for row in rows])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected a report's utterances, but {error!r}. Evaluate again.") from error


def error_rates(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a table that shows a summary's rates."""
    low, high = summary["wer_interval"] or (None, None)
    edits = {key: summary["words"][key] for key in ("count", "substitutions", "insertions", "deletions")}
    rates = {"WER %": summary["wer"], "low": low, "high": high, "CER %": summary["cer"]}
    return {"split": summary["split"], **rates, **edits}


def compare_reports(folders: Sequence[str | Path], split: str | None = None) -> list[dict[str, Any]]:
    """A row for the report in each folder, with its difference from the first one's, paired over utterances.

    Arguments
    ---------
    split : of the reports; None: the one that the first folder has.

    Raises
    ------
    UserError
        where there is no whole report of the split, or two are not of the same utterances.
    """
    split = split or _only_split(Path(folders[0]))
    results = [read_result(folder, split) for folder in folders]
    rows = []
    for folder, result in zip(folders, results, strict=True):
        low, high = result.interval() or (None, None)
        rows.append({"folder": str(folder), "WER %": result.words.rate, "low": low, "high": high})
        rows[-1] |= {"CER %": result.characters.rate, "words": result.words.count}
        try:
            differences = compare(result, results[0]) if len(result.utterances) > 1 else (None, None, None)
        except ValueError as error:
            raise UserError(
                f"{folders[0]} and {folder}: expected reports of the same utterances with the same references, got "
                f"others. Evaluate both on one manifest, with one normaliser ({error})"
            ) from error
        rows[-1] |= dict(zip(("minus first", "diff low", "diff high"), differences, strict=True))
    return rows


def _only_split(folder: Path) -> str:
    found = sorted(path.stem for path in folder.glob("*.jsonl") if path.with_suffix(".json").is_file())
    if len(found) != 1:
        raise UserError(
            f"{folder}: expected the report of one split (<split>.json and <split>.jsonl), got "
            f"{', '.join(found) or 'none'}. {'Name one with --split' if found else 'Evaluate first'}"
        )
    return found[0]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table that also reads well as plain text; the columns are the keys, in the order they first occur.

    Floats get two decimals; None and missing values a dash.

    Example
    -------
    >>> print(format_table([{"model": "teacher", "WER %": 4.256}, {"model": "student", "WER %": None}]))
    | model   | WER % |
    |---------|-------|
    | teacher |  4.26 |
    | student |     - |
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in table) for place in range(len(columns))]
    numeric = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    ruler = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(columns), ruler, *(line(cells) for cells in table[1:])])


def _figures(result: EvaluationResult) -> dict[str, Any]:
    durations_s = [utterance.duration_s for utterance in result.utterances if utterance.duration_s is not None]
    interval = result.interval()
    return {
        "wer": result.words.rate,
        "wer_interval": None if interval is None else list(interval),
        "cer": result.characters.rate,
        "words": _counts(result.words),
        "characters": _counts(result.characters),
        "num_utterances": len(result.utterances),
        "num_utterances_with_errors": int((result.word_errors > 0).sum()),
        "audio_s": round(math.fsum(durations_s), 3) if durations_s else None,
        "longest_audio_s": max(durations_s, default=None),
    }


def _counts(score: Score) -> dict[str, int]:
    return {"count": score.count, **asdict(score)}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
