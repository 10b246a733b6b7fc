"""What a run ends with: its best model on the sets that training never saw, as ``cald-speech evaluate`` scores it.

    test: WER 6.29 % (5.31 to 7.34, 1030 words); report: results/mine/reports/test.json

Reports stand beside the model: a summary, and what was said of each utterance.
"""

import json
import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cald_speech.conversion.model_card import add_figure
from cald_speech.evaluation.labels import classify_folder, classify_table, group_names, summarise
from cald_speech.evaluation.language import evaluate_language
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.files import whole_file
from cald_speech.tasks.base import Task
from cald_speech.tasks.classification import Classification
from cald_speech.tasks.ctc import CTC
from cald_speech.tasks.language_modelling import LanguageModelling
from cald_speech.tasks.text_classification import TextClassification
from cald_speech.training.settings import Settings

logger = logging.getLogger(__name__)

LEARNT_FROM = ("train", "valid")


@dataclass(frozen=True)
class TestSet:
    """One of the sets that prepare() gave, and how it is scored."""

    name: str
    manifest: Path
    settings: Settings
    device: str
    progress: bool = False

    @property
    def model(self) -> Path:
        return Path(self.settings.output_folder) / "model"

    @property
    def reports(self) -> Path:
        return Path(self.settings.output_folder) / "reports"


def score_test_sets(settings: Settings, data: Mapping[str, Path], *, device: str, progress: bool) -> dict[str, Any]:
    """The summary of each set beside the training and the validation set, also written, logged, and put on the card.

    Where ``settings.score_test_sets`` is False nothing is scored, and the command that would do it is told.

    Raises: UserError, as the commands do, for a set that the model cannot be scored on.
    """
    score, command = _way_to_score(settings.task)
    sets = [TestSet(name, path, settings, device, progress) for name, path in data.items() if name not in LEARNT_FROM]
    if settings.score_test_sets and not sets:
        logger.warning("score_test_sets: nothing is scored, since the corpus has no set beside train and valid")
    summaries = {}
    for one in sets if score is not None else ():
        if not settings.score_test_sets:
            by_hand = command and f"`{shlex.join(['cald-speech', command, str(one.model), str(one.manifest)])}` or "
            logger.info("%s: not scored: %s--score_test_sets True does that", one.name, by_hand or "")
            continue
        summaries[one.name] = summary = score(one)
        logger.info("%s: %s; report: %s", one.name, figure_of(summary), one.reports / f"{one.name}.json")
    return summaries


def figure_of(summary: Mapping[str, Any]) -> str:
    """A summary's figure, its 95 % interval and what it was counted over, in a line.

    Example
    -------
    >>> figure_of({"wer": 6.291, "wer_interval": [5.31, 7.34], "words": {"count": 1030}})
    'WER 6.29 % (5.31 to 7.34, 1030 words)'
    >>> figure_of({"accuracy": 50.0, "interval": None, "of": 1})
    'accuracy 50.00 % (of 1)'
    """
    if "wer" in summary:
        name, value, interval = "WER", summary["wer"], summary["wer_interval"]
        unit, counted = " %", f"{summary['words']['count']} words"
    elif "accuracy" in summary:
        name, value, interval = "accuracy", summary["accuracy"], summary["interval"]
        unit, counted = " %", f"of {summary['of']}"
    else:
        name, value, interval = summary["metric"], summary["value"], summary["interval"]
        unit, counted = "", f"{summary['count']} tokens"
    if value is None:
        return f"no {name} ({counted})"
    between = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}, "
    return f"{name} {value:.2f}{unit} ({between}{counted})"


# --- by the task ------------------------------------------------------------------------------------------------------


def _words(one: TestSet) -> dict[str, Any]:
    return evaluate_folder(
        one.model,
        one.manifest,
        one.reports,
        split=one.name,
        normaliser=one.settings.normaliser,
        target_lang=one.settings.target_lang,
        max_batch_s=one.settings.max_batch,
        device=one.device,
        progress=one.progress,
    )


def _labels(one: TestSet) -> dict[str, Any]:
    limit = {"max_batch_s": one.settings.max_batch, "device": one.device}
    found = classify_folder(one.model, one.manifest, one.reports / f"{one.name}_labels.json", **limit)
    return _accuracy(one, summarise(found, group_names(str(one.model))))


def _text_labels(one: TestSet) -> dict[str, Any]:
    limits = {"max_tokens": one.settings.task.max_tokens, "max_batch_tokens": one.settings.max_batch}
    guesses = one.reports / f"{one.name}_labels.json"
    return _accuracy(one, summarise(classify_table(one.model, one.manifest, guesses, device=one.device, **limits)))


def _accuracy(one: TestSet, found: Mapping[str, Any]) -> dict[str, Any]:
    about = {"split": one.name, "model": str(one.model)}
    about["manifest_hash"] = one.settings.task.modality.fingerprint(one.manifest)
    figure = {"value": found["accuracy"], "interval": found["interval"], "count": found["of"]}
    add_figure(one.model, one.name, metric="accuracy %", **figure, manifest_hash=about["manifest_hash"])
    return _written(one, {**about, **found})


def _perplexity(one: TestSet) -> dict[str, Any]:
    limit = {"max_batch_tokens": int(one.settings.max_batch)}
    return _written(one, evaluate_language(str(one.model), one.manifest, device=one.device, **limit))


def _written(one: TestSet, summary: dict[str, Any]) -> dict[str, Any]:
    with whole_file(one.reports / f"{one.name}.json") as unfinished:
        unfinished.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


SCORES: Mapping[type[Task], tuple[Callable[[TestSet], dict[str, Any]], str | None]] = {
    CTC: (_words, "evaluate"),
    TextClassification: (_text_labels, None),
    Classification: (_labels, "labels"),
    LanguageModelling: (_perplexity, "perplexity"),
}
"""How each kind of task is scored, and the command that does the same; the first that fits is taken."""


def _way_to_score(task: Task) -> tuple[Callable[[TestSet], dict[str, Any]] | None, str | None]:
    return next((found for kind, found in SCORES.items() if isinstance(task, kind)), (None, None))


def can_score(task: Task) -> bool:
    """Whether there is a figure of a test set under this task."""
    return _way_to_score(task)[0] is not None
