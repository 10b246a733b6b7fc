"""Which layers need their attention most: what converting each layer alone costs the teacher.

For each layer, the teacher with that layer alone converted: its WER, the KL of its output from the unconverted
teacher's (nats a frame), the cosine distance of the hidden states after the layer and after the last one, and how many
frames each head of the mixer remembers (in the student, if there is one). Keep attention where conversion costs most.
Layers are ranked by KL, as in "Distilling to Hybrid Attention Models via KL-Guided Layer Selection" (arXiv 2512.20569):
it sees every frame, where a few hundred words may not tell layers apart, but also shifts that change no word.

Without a student each mixer is untrained, started from the attention weights it replaces: its cost mixes that start
with the layer's need for attention, and training takes away an unknown part of it. With a student the layer's trained
mixer is put into the teacher; it was trained among the student's other weights, and missing them costs something too.
In both cases the costs of single layers need not add up.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cald_speech.conversion import STARTS, from_pretrained, load_config, replace_layers
from cald_speech.data.dataset import make_dataset
from cald_speech.data.manifests import manifest_hash
from cald_speech.data.text import normalise
from cald_speech.distillation import logit_loss
from cald_speech.distillation.drift import cosine_distances
from cald_speech.errors import UserError, moved
from cald_speech.evaluation.effective_memory import metered
from cald_speech.evaluation.forward import (
    Batch,
    Mean,
    batches,
    check_comparable,
    check_unconverted,
    chosen,
    states_and_output,
)
from cald_speech.evaluation.report import format_table
from cald_speech.families import family_of
from cald_speech.families.hub import load_processor
from cald_speech.mixers import Mixer, MixerFactory, factory_from
from cald_speech.tasks.decoding import greedy
from cald_speech.tasks.wer import EvaluationResult, compare, score

MIXER = '{"mixer": "Bidirectional", "arguments": {"share_projections": true}}'
RANKED_BY = {"wer": "wer_added", "kl": "kl", "distance": "distance_at_end"}
CAVEATS = {
    "untrained": "Each mixer is untrained: its cost mixes how well it started with how much the layer needs attention, "
    "and training takes away an unknown part of it. --student FOLDER measures trained mixers.",
    "trained": "Each mixer was trained among the student's other weights; missing them here is part of its cost.",
}


def rank_layers(
    teacher: str,
    manifest: Path,
    *,
    student: str | None = None,
    mixer: str = MIXER,
    initialise: str = "attention",
    seed: int = 0,
    keep: int = 1,
    rank_by: str = "kl",
    normaliser: str = "librispeech",
    utterances: int = 200,
    max_batch_s: float = 60.0,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Every figure of what converting each layer costs, costliest first, in the form of layer_importance.json.

    Arguments
    ---------
    teacher : folder or hub id of an unconverted model with a CTC head.
    manifest : utterances to read, with their texts; ``utterances`` of them, evenly spread.
    student : a converted model whose trained mixers are measured. None: untrained ones, of the kind ``mixer`` (a class
        name, or its description as in a converted model's config.json), which ``initialise`` and ``seed`` start.
    keep : how many layers are to keep their attention.
    rank_by : a key of RANKED_BY.

    Raises
    ------
    UserError
        for models that do not fit, bad data, or a number of layers to keep that there is not.
    """
    model = load_ctc(teacher, device)
    check_unconverted(teacher, model)
    processor = load_processor(teacher)
    dataset = make_dataset(manifest, processor, normaliser=normaliser, unknown="drop")
    places = chosen(len(dataset), utterances)
    reading = Reading(dataset, places, processor.tokenizer, normaliser, max_batch_s, progress)
    num_words = sum(len(text.split()) for text in reading.references().values())
    if rank_by == "wer" and not num_words:
        raise UserError(f"{manifest}: there is not one word to rank layers by. Give --rank_by kl or distance")
    if student is None:
        whole = None
        make = partial(converted_alone, model, factory=mixer_from(mixer), initialise=initialise, seed=seed)
        variants = {i: make(i) for i in range(len(family_of(model).layers(model)))}
    else:
        whole = load_student(student, teacher, model, device)
        variants = {i: with_mixer_of(whole, model, i) for i in mixers_of(whole)}
    if not 1 <= keep <= len(variants):
        raise UserError(f"--keep: expected from 1 to {len(variants)}, the layers that are converted, got {keep}")
    own, compared = compare_with(model, variants if whole is None else {**variants, "student": whole}, reading)
    kinds = {layer: type(mixers_of(variant)[layer]).__name__ for layer, variant in variants.items()}
    together = compared.get("student")
    rows = [{"mixer": kinds[i], **row_of(i, compared[i], own, remembers=together or compared[i])} for i in variants]
    rows = ranked(rows, rank_by)
    return {
        "teacher": teacher,
        "student_folder": student,
        "manifest": str(manifest),
        "manifest_hash": manifest_hash(manifest),
        "num_utterances": len(places),
        "num_words": num_words,
        "num_layers": len(family_of(model).layers(model)),
        "teacher_wer": own.words.rate,
        "ranked_by": rank_by,
        "layers": rows,
        "student": None
        if together is None
        else {**words_of(together.result, own), "distances": together.distances.values()},
        "keep": sorted(row["layer"] for row in rows[:keep]),
        "border": border(rows, compared, keep),
        "keep_by": {by: sorted(r["layer"] for r in ranked(rows, by)[:keep]) for by in RANKED_BY},
        "caveat": CAVEATS["untrained" if whole is None else "trained"],
    }


def load_ctc(source: str, device: str) -> PreTrainedModel:
    """A model with a CTC head. Raises UserError for one without."""
    if not any("ForCTC" in name for name in load_config(source).architectures or ()):
        raise UserError(f"{source}: expected a model with a CTC head, which writes words, got one without")
    return from_pretrained(source, head="ctc", device=device, new_head=False)


def load_student(source: str, teacher: str, model: PreTrainedModel, device: str) -> PreTrainedModel:
    """A converted model of the same form and vocabulary as its teacher, ``model``."""
    student = load_ctc(source, device)
    check_comparable({teacher: model, source: student})
    sizes = model.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{teacher} and {source} differ in their vocabulary: expected the same, got {sizes[0]} and {sizes[1]} "
            "outputs. Give the student's own teacher"
        )
    if not mixers_of(student):
        raise UserError(f"--student {source}: expected a converted model, got one with attention in every layer")
    return student


# --- one layer converted at a time


def mixer_from(text: str) -> MixerFactory:
    """A mixer's class name, or its description as in a converted model's config.json. Raises UserError for others.

    Example
    -------
    >>> mixer_from("Bidirectional")(64, 4).share_projections, mixer_from(MIXER)(64, 4).share_projections
    (False, True)
    """
    try:
        described = {"arguments": {}} | (json.loads(text) if text.lstrip().startswith("{") else {"mixer": text})
        if not isinstance(described["arguments"], dict):
            raise ValueError(f"arguments: expected keys and values, got {described['arguments']!r}")
        return factory_from(described)
    except ValueError as error:
        raise UserError(f"--mixer: {error}. Give a class name, or JSON such as '{MIXER}'") from error


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules over again, around the same parameters and buffers: a layer of one can be replaced alone."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, shared)


def converted_alone(
    teacher: PreTrainedModel, index: int, factory: MixerFactory, *, initialise: str = "attention", seed: int = 0
) -> PreTrainedModel:
    """The teacher with a new mixer in layer ``index``; it shares all other weights with ``teacher``.

    ``seed`` fixes what is drawn, so that every layer's mixer gets the same numbers.
    """
    model, family = twin(teacher), family_of(teacher)
    factories: list[MixerFactory | None] = [None] * len(family.layers(model))
    factories[index] = factory
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        replace_layers(model, family, factories, start=STARTS[initialise])
    return model.eval()


def with_mixer_of(student: PreTrainedModel, teacher: PreTrainedModel, index: int) -> PreTrainedModel:
    """The teacher with a copy of the student's mixer in layer ``index``."""
    model, family = twin(teacher), family_of(teacher)
    family.replace_attention(model, index, deepcopy(mixers_of(student)[index]))
    return model.eval()


def mixers_of(model: PreTrainedModel) -> dict[int, Mixer]:
    """The mixer of each converted layer."""
    family = family_of(model)
    filled = {index: family.mixer(layer) for index, layer in enumerate(family.layers(model))}
    return {index: mixer for index, mixer in filled.items() if mixer is not None}


@dataclass(frozen=True)
class Reading:
    """Which utterances are read, and how what was read is written down."""

    dataset: DynamicItemDataset
    places: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    normaliser: str
    max_batch_s: float
    progress: bool = False

    def words(self, logits: Tensor, batch: Batch) -> dict[str, str]:
        texts = greedy(logits, batch.lengths.cpu(), self.tokenizer)
        return {key: normalise(text, self.normaliser) for key, text in zip(batch.ids, texts, strict=True)}

    def references(self) -> dict[str, str]:
        with self.dataset.output_keys_as(["id", "text"]):
            items = [self.dataset[place] for place in self.places]
        return {item["id"]: item["text"] for item in items}


@dataclass
class Comparison:
    """A model against the teacher: mean cosine distance in each layer, KL in nats a frame, words, memories."""

    distances: Mean = field(default_factory=Mean)
    divergence: Mean = field(default_factory=Mean)
    hypotheses: dict[str, str] = field(default_factory=dict)
    memory_frames: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    result: EvaluationResult | None = None


def compare_with(
    teacher: PreTrainedModel, others: Mapping[int | str, PreTrainedModel], reading: Reading
) -> tuple[EvaluationResult, dict[int | str, Comparison]]:
    """Read every utterance with the teacher and each other model, all of one family and width.

    Returns the teacher's own words, scored, and by the keys of ``others`` how each model compares.
    """
    own: dict[str, str] = {}
    compared = {key: Comparison() for key in others}
    with ExitStack() as stack:
        meters = {key: stack.enter_context(metered(mixers_of(model))) for key, model in others.items()}
        bar = stack.enter_context(tqdm(total=len(reading.places), unit="utt", disable=not reading.progress))
        for batch in batches(reading.dataset, teacher, reading.max_batch_s, places=reading.places):
            states, logits = states_and_output(teacher, batch)
            own |= reading.words(logits, batch)
            for key, model in others.items():
                their_states, their_logits = states_and_output(model, batch)
                found = compared[key]
                found.distances.add(*cosine_distances(their_states, states, batch.layer_lengths))
                found.divergence.add(*logit_loss(their_logits, logits, batch.lengths, temperature=1.0))
                found.hypotheses |= reading.words(their_logits, batch)
            bar.update(len(batch.ids))
    references = reading.references()
    for key, found in compared.items():
        found.result = score(references, found.hypotheses)
        found.memory_frames = {index: meter.frames() for index, meter in meters[key].items()}
    return score(references, own), compared


# --- from costs to the layers that keep their attention


def row_of(layer: int, found: Comparison, own: EvaluationResult, *, remembers: Comparison) -> dict[str, Any]:
    """The figures of the teacher with ``layer`` converted, against the teacher's own words.

    ``remembers`` : the model in which the layer's mixer worked when its memory was measured.
    """
    distances = found.distances.values()
    return {
        "layer": layer,
        **words_of(found.result, own),
        "kl": found.divergence.values(),
        "distance_after_layer": distances[layer],
        "distance_at_end": distances[-1],
        "memory_frames": remembers.memory_frames[layer],
    }


def words_of(result: EvaluationResult, own: EvaluationResult) -> dict[str, Any]:
    """WER in percent, and what it adds to the teacher's, paired over utterances; None where that is unknown."""
    if not own.words.count:
        return {"wer": None, "wer_added": None, "wer_added_interval": None}
    added = result.words.rate - own.words.rate
    interval = compare(result, own)[1:] if len(own.utterances) > 1 else None
    return {"wer": result.words.rate, "wer_added": added, "wer_added_interval": interval}


def ranked(rows: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Costliest first; equal costs by KL.

    Example
    -------
    >>> rows = [{"layer": 0, "wer_added": 1.0, "kl": 0.1}, {"layer": 1, "wer_added": 1.0, "kl": 0.3}]
    >>> [row["layer"] for row in ranked(rows, "wer")]
    [1, 0]
    """
    key = RANKED_BY[by]
    return sorted(rows, key=lambda row: (-(row[key] or 0.0), -row["kl"], row["layer"]))


def border(rows: Sequence[dict[str, Any]], compared: Mapping[Any, Comparison], keep: int) -> dict[str, Any] | None:
    """How the last layer that is kept and the first that is not differ in WER, paired; None where that is unknown."""
    if keep == len(rows) or rows[0]["wer_added_interval"] is None:
        return None
    kept, converted = (row["layer"] for row in rows[keep - 1 : keep + 1])
    difference, low, high = compare(compared[kept].result, compared[converted].result)
    return {"kept": kept, "converted": converted, "wer_difference": difference, "interval": [low, high]}


def overrides_yaml(layers: Sequence[int]) -> str:
    """A layer map's overrides that keep attention in ``layers``, for an experiment's yaml.

    Example
    -------
    >>> print(overrides_yaml([5, 11]))
    layer_map:
        overrides: {5: null, 11: null} # counted from 0; null keeps attention
    """
    kept = ", ".join(f"{layer}: null" for layer in layers)
    return f"layer_map:\n    overrides: {{{kept}}} # counted from 0; null keeps attention"


def tables(found: Mapping[str, Any]) -> str:
    """The ranking for people, what must be known to read it, and the yaml that keeps attention where it is needed."""
    first = f"teacher: WER {_percent(found['teacher_wer'])} on {found['num_words']} words"
    return "\n\n".join([first, _table(found["layers"]), *_remarks(found), overrides_yaml(found["keep"])])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Memory is the median over heads, with the smallest and the largest, in frames."""
    lines = []
    for row in rows:
        interval = row["wer_added_interval"]
        line = {"layer": row["layer"], "mixer": row["mixer"], "WER %": row["wer"], "added": row["wer_added"]}
        line["95 % interval"] = None if interval is None else "{:.2f} to {:.2f}".format(*interval)
        line |= {
            "KL": f"{row['kl']:.4f}",
            "distance after it": f"{row['distance_after_layer']:.4f}",
            "at the end": f"{row['distance_at_end']:.4f}",
        }
        for direction, heads in row["memory_frames"].items():
            line[f"memory {direction}"] = f"{median(heads):.0f} ({min(heads):.0f} to {max(heads):.0f})"
        lines.append(line)
    return format_table(lines)


def _remarks(found: Mapping[str, Any]) -> list[str]:
    """What must be known to read the ranking."""
    lines = []
    if found["student"] is not None:
        lines.append(f"The whole student, all its mixers at once: WER {_percent(found['student']['wer'])}.")
        kept = sorted(set(range(found["num_layers"])) - {row["layer"] for row in found["layers"]})
        if kept:
            lines.append(f"Not measured, since the student keeps attention there: {', '.join(map(str, kept))}.")
    lines.append(f"{found['caveat']} The costs of single layers need not add up.")
    edge = found["border"]
    if edge is not None:
        low, high = edge["interval"]
        told = "so these words tell them apart" if low > 0 or high < 0 else "so these words do not tell them apart"
        lines.append(
            f"WER with layer {edge['kept']} (kept) converted minus that with layer {edge['converted']} (not kept): "
            f"{edge['wer_difference']:.2f} points (95 %: {low:.2f} to {high:.2f}), {told}."
        )
    choices = "; ".join(f"by {by}: {', '.join(map(str, layers))}" for by, layers in found["keep_by"].items())
    return [*lines, f"To keep, {choices}."]


def _percent(rate: float | None) -> str:
    return "unknown (there are no words)" if rate is None else f"{rate:.2f} %"


if __name__ == "__main__":
    moved("cald-speech layers")
