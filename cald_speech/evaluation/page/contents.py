"""From what was found to what the page draws: names, curves, comparisons, edits; nothing here is drawn."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

import cald_speech
from cald_speech.errors import UserError
from cald_speech.evaluation.page.found import Evaluation, Found, Run
from cald_speech.tasks.wer import Utterance, compare

MOST_POINTS = 800  # of a curve
MOST_PAIRS = 8  # models that are compared each with each; of more, each with the first
UNTOLD = {"output_folder"}  # differs between any two runs


def contents_of(found: Found, *, most_utterances: int) -> dict[str, Any]:
    """What the page holds, but for sound, as JSON values without NaN."""
    runs = [_run(run, name) for run, name in zip(found.runs, names_of([r.folder for r in found.runs]), strict=True)]
    sets = _sets(found.evaluations, most_utterances)
    figures = zip(found.figures, names_of([figure.folder for figure in found.figures]), strict=True)
    models = [model["name"] for shown in sets for model in shown["models"]]
    contents = {
        "title": f"Report: {', '.join(dict.fromkeys([*models, *(run['name'] for run in runs)])) or 'layers'}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": cald_speech.__version__,
        "names": list(dict.fromkeys([*models, *(run["name"] for run in runs)])),  # a colour for each
        "runs": runs,
        "settings": _different_settings(found.runs),
        "sets": sets,
        "figures": [{"kind": figure.kind, "name": name, "found": figure.found} for figure, name in figures],
    }
    return _finite(contents)


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, that none of the others has: what is left without what all have in common.

    Example
    -------
    >>> names_of([Path("results/demo/reports/teacher"), Path("results/demo/reports/student")])
    ['teacher', 'student']
    >>> names_of([Path("a/seed-0/report"), Path("b/seed-0/report")]), names_of([Path("results/mamba/report")])
    (['a', 'b'], ['mamba'])
    """
    paths = [list(folder.absolute().parts) for folder in folders]
    for parts in paths:
        while len(parts) > 2 and parts[-1] in ("report", "reports"):
            parts.pop()
    different = {tuple(path) for path in paths}
    if len(different) > 1:
        while min(map(len, paths)) > 1 and len({path[-1] for path in paths}) == 1:
            paths = [path[:-1] for path in paths]
        while min(map(len, paths)) > 1 and len({path[0] for path in paths}) == 1:
            paths = [path[1:] for path in paths]
    else:
        paths = [path[-1:] for path in paths]
    short = ["/".join(path) for path in paths]
    return short if len(set(short)) == len(different) else [str(folder) for folder in folders]


# --- runs


def _run(run: Run, name: str) -> dict[str, Any]:
    curves: dict[str, list[list[float]]] = {}
    for line in run.log:
        for key, value in line.items():
            if key != "step":
                curves.setdefault(key, []).append([int(line["step"]), float(f"{value:.5g}")])
    curves.pop("skipped_steps", None)
    first = run.starts[0] if run.starts else {}
    return {
        "name": name,
        "folder": str(run.folder),
        "curves": {key: _thinned(points) for key, points in curves.items()},
        "last_step": int(run.log[-1]["step"]),
        "skipped": int(max((line.get("skipped_steps", 0.0) for line in run.log), default=0)),
        "best": _best(curves),
        "starts": [{key: start.get(key) for key in ("step", "time", "host")} for start in run.starts],
        "command": " ".join(map(str, first.get("command") or ())),
        "settings": run.settings,
        "is_cut": run.is_cut,
    }


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Every k-th point, and the last."""
    step = -(-len(points) // MOST_POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]


def _best(curves: Mapping[str, list[list[float]]]) -> dict[str, Any] | None:
    """The lowest figure of a validation, and when: of what is not the loss, if anything else was measured."""
    measured = sorted((key for key in curves if key.startswith("valid/")), key=lambda key: key == "valid/loss")
    for key in measured:
        known = [(value, step) for step, value in curves[key] if math.isfinite(value)]
        if known:
            value, step = min(known)
            return {"metric": key.removeprefix("valid/"), "value": value, "step": step}
    return None


def _different_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The keys whose values are not the same in all runs, with these values as text; none for one run."""
    trees = [_settings(run) for run in runs if run.settings]
    if len(trees) < 2 or len(trees) < len(runs):
        return []
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in UNTOLD)
    rows = [{"key": key, "values": [tree.get(key) for tree in trees]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def _settings(run: Run) -> dict[str, str]:
    """Each key's value as it would be written; tags are not followed, and nothing is built."""
    yaml = YAML()
    yaml.width = 10_000
    yaml.default_flow_style = True
    try:
        tree = yaml.load(run.settings)
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{run.folder / 'settings.yaml'}: expected yaml, but {error}. Delete it") from error
    if not isinstance(tree, Mapping):
        raise UserError(f"{run.folder / 'settings.yaml'}: expected keys and values, got another. Delete it")
    return {str(key): _written(yaml, value) for key, value in tree.items()}


def _written(yaml: YAML, value: Any) -> str:
    if value is None or isinstance(value, str | int | float):
        return "-" if value is None else str(value)
    stream = StringIO()
    yaml.dump(value, stream)
    return " ".join(stream.getvalue().removesuffix("...\n").split())


# --- evaluations


def _sets(evaluations: Sequence[Evaluation], most: int) -> list[dict[str, Any]]:
    """The evaluations, those together that scored the same references under one normaliser."""
    together: dict[tuple[str, ...], list[Evaluation]] = {}
    for evaluation in evaluations:
        texts = [(u.id, u.reference) for u in evaluation.result.utterances]
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        together.setdefault((evaluation.split, evaluation.summary["normaliser"], digest), []).append(evaluation)
    return [_set(same, most) for same in together.values()]


def _set(same: Sequence[Evaluation], most: int) -> dict[str, Any]:
    first = same[0]
    names = names_of([evaluation.folder for evaluation in same])
    errors = [[u.words.errors for u in evaluation.result.utterances] for evaluation in same]
    order = sorted(range(len(errors[0])), key=lambda i: (-max(found[i] for found in errors), i))
    shown = sorted(order[:most])
    return {
        "split": first.split,
        "normaliser": first.summary["normaliser"],
        "manifest_hash": str(first.summary.get("manifest_hash", ""))[:12],
        "manifests": [str(path) for path in dict.fromkeys(map(_manifest, same))],
        "audio_s": first.summary.get("audio_s"),
        "models": [_model(evaluation, name) for evaluation, name in zip(same, names, strict=True)],
        "differences": _differences(same),
        "num_utterances": len(errors[0]),
        "utterances": [_utterance([evaluation.result.utterances[i] for evaluation in same]) for i in shown],
    }


def _manifest(evaluation: Evaluation) -> Path:
    """Where the set was described: as the summary says, or as recipes have it, beside the report."""
    known = evaluation.summary.get("manifest")
    return Path(known) if known else evaluation.folder / "manifests" / f"{evaluation.split}.json"


def _model(evaluation: Evaluation, name: str) -> dict[str, Any]:
    summary, result = evaluation.summary, evaluation.result
    words = result.words
    facts = ("model", "decoder", "parameters", "device", "dtype", "seconds")
    return {
        "name": name,
        "folder": str(evaluation.folder),
        "wer": words.rate,
        "interval": result.interval(),
        "cer": result.characters.rate,
        "words": words.count,
        "substitutions": words.substitutions,
        "insertions": words.insertions,
        "deletions": words.deletions,
        "with_errors": int((result.word_errors > 0).sum()),
        **{key: summary.get(key) for key in facts},
    }


def _differences(same: Sequence[Evaluation]) -> list[list[tuple[float, float, float] | None]]:
    """Row by row: model minus the model of the column, with its interval; None where it is not worked out."""
    results = [evaluation.result for evaluation in same]
    table: list[list[tuple[float, float, float] | None]] = [[None] * len(same) for _ in same]
    if len(results[0].utterances) < 2 or not results[0].words.count:
        return table
    for row in range(len(same)):
        for column in range(row if len(same) <= MOST_PAIRS else min(row, 1)):
            difference, low, high = compare(results[row], results[column])
            table[row][column], table[column][row] = (difference, low, high), (-difference, -high, -low)
    return table


def _utterance(said: Sequence[Utterance]) -> dict[str, Any]:
    """An utterance as all models heard it. Of the alignments there stand the signs, and the words that are edits."""
    heard = [
        {
            "signs": "".join(sign for sign, _, _ in utterance.alignment),
            "words": [word for sign, _, word in utterance.alignment if sign in "SI"],
            "errors": utterance.words.errors,
        }
        for utterance in said
    ]
    first = said[0]
    return {"id": first.id, "reference": first.reference, "seconds": first.duration_s, "heard": heard}


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
