"""Which layers of a distilled student gain most when their attention comes back: a hybrid, chosen by restoring.

"Distilling to Hybrid Attention Models via KL-Guided Layer Selection" (arXiv 2512.20569): begin with the student all of
whose layers are converted, restore each layer's attention in turn, keep the one with which the output is nearest to the
teacher's (KL, nats a frame), and go on from there. What converting each layer alone costs the teacher
(``layer_importance.py``) is the reverse: that mixer works among weights that it was not trained with, and single costs
need not add up. Here every choice is made in the student itself, beside those made before.

A restored layer has the teacher's attention and everything else of the student's, without further training.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import cald_speech
from cald_speech.conversion import ConversionReport, LayerMap, convert, save_processor
from cald_speech.conversion.model_card import read_facts, update_facts
from cald_speech.data.dataset import make_dataset
from cald_speech.data.manifests import manifest_hash
from cald_speech.errors import UserError
from cald_speech.evaluation.forward import check_unconverted, chosen
from cald_speech.evaluation.layer_importance import (
    Comparison,
    Reading,
    compare_with,
    load_ctc,
    load_student,
    mixers_of,
    overrides_yaml,
    twin,
    words_of,
)
from cald_speech.evaluation.report import format_table
from cald_speech.families import family_of
from cald_speech.families.hub import load_processor
from cald_speech.files import whole_folder
from cald_speech.tasks.wer import EvaluationResult


def restored(student: PreTrainedModel, teacher: PreTrainedModel, layers: Collection[int]) -> PreTrainedModel:
    """The student with its teacher's attention in ``layers``, a model as conversion makes it.

    It shares its weights with ``student`` and, in these layers, with ``teacher``. Both stay as they are.
    """
    layer_map = LayerMap.from_dict(student.config.layer_map)
    model = twin(teacher)
    with torch.random.fork_rng():
        overrides = {**layer_map.overrides, **dict.fromkeys(layers)}
        convert(model, LayerMap(layer_map.default, overrides), initialise="random")
    own = student.state_dict()
    taken = {name: own[name] for name in model.state_dict() if name in own}
    missing, _ = model.load_state_dict(taken, strict=False, assign=True)
    if strange := sorted(set(missing) - teacher.state_dict().keys()):
        raise UserError(
            f"the student has no {strange[0]}, and {len(strange)} weights like it: expected a model that was converted "
            "from this teacher. Give the student's own teacher"
        )
    return model.eval().requires_grad_(False)


def restore_layers(
    teacher: str,
    manifest: Path,
    student: str,
    *,
    keep_best: int,
    normaliser: str = "librispeech",
    utterances: int = 200,
    max_batch_s: float = 60.0,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Restore one layer after the other, each time the one that brings the output nearest to the teacher's.

    Arguments
    ---------
    teacher, student : folders or hub ids of an unconverted model with a CTC head and of one converted from it.
    manifest : utterances to read, with their texts; ``utterances`` of them, evenly spread. The choice is made on them:
        measure the WER of what was chosen on others.
    keep_best : how many layers get their attention back, from 1 to all that are converted.

    Returns
    -------
    ``steps``: kept layers, KL and WER from none on; ``gains``: by how much each layer, restored alone, lowers the KL;
    ``keep``: the chosen layers, with those that the student keeps anyway.

    Raises
    ------
    UserError
        for models that do not fit, bad data, or a number of layers that there is not.
    """
    original = load_ctc(teacher, device)
    check_unconverted(teacher, original)
    own = load_student(student, teacher, original, device)
    processor = load_processor(teacher)
    left = sorted(mixers_of(own))
    kept = set(range(len(family_of(original).layers(original)))) - set(left)
    if not 1 <= keep_best <= len(left):
        raise UserError(f"--keep_best: expected from 1 to {len(left)}, the layers that are converted, got {keep_best}")
    dataset = make_dataset(manifest, processor, normaliser=normaliser, unknown="drop")
    places = chosen(len(dataset), utterances)
    reading = Reading(dataset, places, processor.tokenizer, normaliser, max_batch_s, progress)

    taken: list[int] = []
    steps: list[dict[str, Any]] = []
    gains: dict[int, float] = {}
    while len(taken) < keep_best:
        others: dict[int | str, PreTrainedModel] = {i: restored(own, original, [*taken, i]) for i in left}
        words, compared = compare_with(original, others | ({} if steps else {"student": own}), reading)
        if not steps:
            steps.append(_step([], compared["student"], words))
            gains = {i: steps[0]["kl"] - compared[i].divergence.values() for i in left}
        best = min(left, key=lambda i: (compared[i].divergence.values(), i))
        left.remove(best)
        taken.append(best)
        steps.append(_step(taken, compared[best], words))
    return {
        "teacher": teacher,
        "student_folder": student,
        "manifest": str(manifest),
        "manifest_hash": manifest_hash(manifest),
        "num_utterances": len(places),
        "teacher_wer": words.words.rate,
        "gains": gains,
        "steps": steps,
        "restored": taken,
        "keep": sorted([*taken, *kept]),
    }


def _step(taken: Sequence[int], found: Comparison, own: EvaluationResult) -> dict[str, Any]:
    return {"restored": list(taken), "kl": found.divergence.values(), **words_of(found.result, own)}


def save_restored(teacher: str, student: str, layers: Collection[int], folder: Path) -> None:
    """Write the student with the teacher's attention in ``layers`` as a model folder, whole or not at all."""
    original = load_ctc(teacher, "cpu")
    model = restored(load_student(student, teacher, original, "cpu"), original, layers)
    known = read_facts(Path(student)) if Path(student).is_dir() else {}
    facts = {key: known[key] for key in ("base_model", "licence", "pipeline") if key in known}
    facts |= {"model": type(model).__name__, "teacher": teacher, "student": student}
    facts |= {"guidance": f"none since attention came back in layers {_listed(layers)}"}
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        save_processor(load_processor(teacher), model, unfinished)
        update_facts(unfinished, **facts, **ConversionReport.of(model).facts(), version=cald_speech.__version__)


def keep_yaml(found: Mapping[str, Any]) -> str:
    """An experiment's lines that keep attention in the chosen layers, with what chose them."""
    return (
        f"# Chosen by restoring attention in {found['student_folder']}, on {found['num_utterances']} utterances of\n"
        f"# {found['manifest']}, in this order: {_listed(found['restored'])}. Lay it over an experiment with `base:`.\n"
        f"{overrides_yaml(found['keep'])}\n"
    )


def table(found: Mapping[str, Any]) -> str:
    """KL and WER against restored layers, for people."""
    rows = []
    for step in found["steps"]:
        interval = step["wer_added_interval"]
        row = {"restored": len(step["restored"]), "layers": _listed(step["restored"]), "KL": f"{step['kl']:.4f}"}
        row |= {"WER %": step["wer"], "over the teacher's": step["wer_added"]}
        rows.append(row | {"95 % interval": None if interval is None else "{:.2f} to {:.2f}".format(*interval)})
    gains = sorted(found["gains"].items(), key=lambda item: -item[1])
    alone = ", ".join(f"{layer} ({gain:.4f})" for layer, gain in gains)
    return f"{format_table(rows)}\n\nBy how much each layer, restored alone, lowers the KL: {alone}."


def _listed(layers: Collection[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
