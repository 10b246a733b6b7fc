"""What a classifier says of each utterance of a manifest or row of a table: one label, or one of each of its groups."""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from cald_speech.conversion import from_pretrained, load_config
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import moved
from cald_speech.evaluation.forward import batches, naming
from cald_speech.files import whole_file
from cald_speech.tasks.base import Processor
from cald_speech.tasks.bootstrap import bootstrap_interval
from cald_speech.tasks.classification import Classification
from cald_speech.tasks.intent import Intent, LabelGroups
from cald_speech.tasks.processors import feature_extractor, tokenizer_of
from cald_speech.tasks.text_classification import TextClassification


def classify_folder(
    source: str | Path, manifest: str | Path, report: str | Path, *, max_batch_s: float = 60.0, device: str = "cpu"
) -> dict[str, tuple[str, str]]:
    """(label, guess) of each utterance of a manifest whose "text" is its label, also written to ``report``, as JSON.

    Arguments
    ---------
    source : folder or hub id of a model with a classification head, whose ``id2label`` names the classes. Where it
        names groups, as ``scenario:alarm``, label and guess are one label of each group: "alarm set".

    Raises
    ------
    UserError
        for a model or manifest that cannot be used, or labels that the model does not know.
    """
    model = from_pretrained(source, head="classification", device=device, new_head=False)
    groups = _groups(model.config)
    groups.check(Path(manifest), read_manifest(manifest), f"the model in {source}")
    task = Intent(groups.groups) if len(groups.groups) > 1 else Classification(groups.names)
    extractor = feature_extractor([str(source)], None)
    dataset = task.dataset(Path(manifest), extractor, normaliser="none", unknown="error")
    found = classify(model, task, dataset, extractor, max_batch=max_batch_s)
    write_guesses(report, found)
    return found


def classify_table(
    source: str | Path,
    table: str | Path,
    report: str | Path,
    *,
    max_tokens: int = 512,
    max_batch_tokens: int = 16384,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[str, str]]:
    """(label, guess) of each row, by its place, also written to ``report`` as JSON.

    Arguments
    ---------
    source : folder or hub id of a model with a classification head, whose ``id2label`` names the classes, and with its
        tokenizer.
    max_tokens : longer rows are cut, and counted in the log.
    max_batch_tokens : in a batch, padding counted.

    Raises
    ------
    UserError
        for a model or table that cannot be used, labels that the model does not know, or more tokens than it has
        positions or a mixer weights for.
    """
    model = from_pretrained(source, head="classification", dtype=dtype, device=device, new_head=False)
    names = [model.config.id2label[place] for place in sorted(model.config.id2label)]
    task, tokenizer = TextClassification(names, max_tokens), tokenizer_of([str(source)], None)
    task.head_options(str(source), model.config, tokenizer)
    dataset = task.dataset(Path(table), tokenizer, normaliser="none", unknown="error")
    found = classify(model, task, dataset, tokenizer, max_batch=max_batch_tokens)
    write_guesses(report, found)
    return found


def classify(
    model: PreTrainedModel, task: Classification, dataset: Dataset, processor: Processor, *, max_batch: float
) -> dict[str, tuple[str, str]]:
    """(label, guess) of each item of a set by its id, of any task with labels; ``max_batch`` is in the task's unit."""
    found: dict[str, tuple[str, str]] = {}
    for batch in batches(dataset, model, max_batch, modality=task.modality, whole_items=True):
        with naming(batch.ids, task.modality.batch_limit), torch.inference_mode():
            outputs = task.outputs(model(**batch.arguments))
            results = task.results(outputs, None, batch.lengths, batch.items, processor)
        found |= dict(zip(batch.ids, results, strict=True))
    return found


def write_guesses(report: str | Path, found: Mapping[str, tuple[str, str]]) -> None:
    """Write label and guess of each item, as JSON. Atomic."""
    with whole_file(report) as unfinished:
        unfinished.write_text(json.dumps(found, indent=1) + "\n")


def _groups(config: PretrainedConfig) -> LabelGroups:
    return LabelGroups.of([config.id2label[place] for place in sorted(config.id2label)])


def group_names(source: str | Path) -> list[str]:
    """The names of the groups of labels that a model folder or hub id tells apart; none where it is one label."""
    return [name for name in _groups(load_config(str(source))).groups if name]


def summarise(
    found: Mapping[str, tuple[str, str]], names: Sequence[str] = (), *, drawn_by: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """How many of ``found`` are right in all groups, and the accuracy in percent: of all, and in each of ``names``.

    ``mean_of_groups`` is the mean over these names: what CALD's code prints of SLURP as its accuracy.

    ``drawn_by`` says for each utterance which others are drawn with it for the 95 % interval, such as the recordings
    of one sentence. There is no interval where there is one utterance, or one such set.

    Example
    -------
    >>> found = {"a": ("alarm set", "alarm set"), "b": ("alarm set", "alarm query")}
    >>> summary = summarise(found, ["scenario", "action"])
    >>> summary["right"], summary["accuracy"], summary["groups"], summary["mean_of_groups"]
    (1, 50.0, {'scenario': 100.0, 'action': 50.0}, 75.0)
    """
    right = [int(label == guess) for label, guess in found.values()]
    drawn = len(right) if drawn_by is None else len(set(drawn_by))
    interval = bootstrap_interval(right, [1] * len(right), groups=drawn_by) if drawn > 1 else None
    summary = {"right": sum(right), "of": len(right), "accuracy": 100 * sum(right) / len(right), "interval": interval}
    if names:
        # A guess that was spelt out may lack a word: slices do not mind.
        pairs = [(label.split(" "), guess.split(" ")) for label, guess in found.values()]
        same = {name: [a[i : i + 1] == b[i : i + 1] for a, b in pairs] for i, name in enumerate(names)}
        summary["groups"] = {name: 100 * sum(of_one) / len(of_one) for name, of_one in same.items()}
        summary["mean_of_groups"] = sum(summary["groups"].values()) / len(names)
    return summary


if __name__ == "__main__":
    moved("cald-speech labels")
