"""Which layers need their attention most: what converting each layer alone costs the teacher.

    python -m cald_speech.evaluation.layer_importance results/digits/teacher/model \\
        results/digits/data/manifests/valid.json --student results/digits/target-seed0/model --keep 1

For each layer, the teacher with that layer alone converted: its WER, the KL of its output from the unconverted
teacher's (nats a frame), the cosine distance of the hidden states after the layer and after the last one, and how many
frames each head of the mixer remembers (in the student, if there is one). Keep attention where conversion costs most.
Layers are ranked by KL, as in "Distilling to Hybrid Attention Models via KL-Guided Layer Selection" (arXiv 2512.20569):
it sees every frame, where a few hundred words may not tell layers apart, but also shifts that change no word.

Without --student each mixer is untrained, started from the attention weights it replaces: its cost mixes that start
with the layer's need for attention, and training takes away an unknown part of it. With --student the layer's trained
mixer is put into the teacher; it was trained among the student's other weights, and missing them costs something too.
In both cases the costs of single layers need not add up.

Writes layer_importance.json and .png into --output; prints the ranking, a yaml snippet, and one JSON line last.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cald_speech.conversion import STARTS, load_config
from cald_speech.data.dataset import make_dataset
from cald_speech.data.manifests import manifest_hash
from cald_speech.errors import UserError
from cald_speech.evaluation.forward import check_comparable, check_unconverted, chosen, load
from cald_speech.evaluation.layer_command import add_common_options, made_and_written
from cald_speech.evaluation.layer_costs import Reading, compare_with, converted_alone, mixers_of, with_mixer_of
from cald_speech.evaluation.layer_figures import draw_importance
from cald_speech.evaluation.layer_ranking import RANKED_BY, border, overrides_yaml, ranked, row_of, table, words_of
from cald_speech.families import family_of
from cald_speech.mixers import MixerFactory, factory_from
from cald_speech.tasks.reading import load_processor

MIXER = '{"mixer": "Bidirectional", "arguments": {"share_projections": true}}'
CAVEATS = {
    "untrained": "Each mixer is untrained: its cost mixes how well it started with how much the layer needs attention, "
    "and training takes away an unknown part of it. --student FOLDER measures trained mixers.",
    "trained": "Each mixer was trained among the student's other weights; missing them here is part of its cost.",
}


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Every figure, as it goes into layer_importance.json.

    Raises UserError for models that do not fit, bad data, or a number of layers to keep that there is not.
    """
    teacher = _load_ctc(args.teacher, args.device)
    check_unconverted(args.teacher, teacher)
    processor = load_processor(args.teacher)
    dataset = make_dataset(args.manifest, processor, normaliser=args.normaliser, unknown="drop")
    places = chosen(len(dataset), args.utterances)
    reading = Reading(dataset, places, processor.tokenizer, args.normaliser, args.max_batch_s, args.quiet)
    num_words = sum(len(text.split()) for text in reading.references().values())
    if args.rank_by == "wer" and not num_words:
        raise UserError(f"{args.manifest}: there is not one word to rank layers by. Give --rank_by kl or distance")
    models, student = variants(teacher, args)
    if not 1 <= args.keep <= len(models):
        raise UserError(f"--keep: expected from 1 to {len(models)}, the layers that are converted, got {args.keep}")
    own, compared = compare_with(teacher, models if student is None else {**models, "student": student}, reading)
    kinds = {layer: type(mixers_of(model)[layer]).__name__ for layer, model in models.items()}
    whole = compared.get("student")
    rows = [{"mixer": kinds[i], **row_of(i, compared[i], own, remembers=whole or compared[i])} for i in models]
    rows = ranked(rows, args.rank_by)
    return {
        "teacher": args.teacher,
        "student_folder": args.student,
        "manifest": str(args.manifest),
        "manifest_hash": manifest_hash(args.manifest),
        "num_utterances": len(places),
        "num_words": num_words,
        "num_layers": len(family_of(teacher).layers(teacher)),
        "teacher_wer": own.words.rate,
        "ranked_by": args.rank_by,
        "layers": rows,
        "student": None if whole is None else {**words_of(whole.result, own), "distances": whole.distances.values()},
        "keep": sorted(row["layer"] for row in rows[: args.keep]),
        "border": border(rows, compared, args.keep),
        "keep_by": {by: sorted(r["layer"] for r in ranked(rows, by)[: args.keep]) for by in RANKED_BY},
        "caveat": CAVEATS["untrained" if student is None else "trained"],
    }


def variants(
    teacher: PreTrainedModel, args: argparse.Namespace
) -> tuple[dict[int, PreTrainedModel], PreTrainedModel | None]:
    """The teacher with each layer alone converted, by layer, and the student if there is one."""
    if args.student is None:
        make = partial(converted_alone, teacher, initialise=args.initialise, seed=args.seed)
        mixer = mixer_from(args.mixer)
        return {i: make(i, mixer) for i in range(len(family_of(teacher).layers(teacher)))}, None
    student = _load_ctc(args.student, args.device)
    check_comparable({args.teacher: teacher, args.student: student})
    sizes = teacher.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{args.teacher} and {args.student} differ in their vocabulary: expected the same, got {sizes[0]} and "
            f"{sizes[1]} outputs. Give the student's own teacher"
        )
    layers = mixers_of(student)
    if not layers:
        raise UserError(f"--student {args.student}: expected a converted model, got one with attention in every layer")
    return {i: with_mixer_of(student, teacher, i) for i in layers}, student


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


def _load_ctc(source: str, device: str) -> PreTrainedModel:
    if not any("ForCTC" in name for name in load_config(source).architectures or ()):
        raise UserError(f"{source}: expected a model with a CTC head, which writes words, got one without")
    return load(source, device, head="ctc")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="folder or hub id of an unconverted model with a CTC head")
    add("manifest", metavar="MANIFEST", type=Path, help="utterances to read, with their texts")
    mixers = parser.add_mutually_exclusive_group()
    mixers.add_argument("--student", help="converted model whose trained mixers are measured")
    mixers.add_argument("--mixer", default=MIXER, help=f"untrained mixer: class name or JSON ({MIXER})")
    add("--initialise", choices=STARTS, default="attention", help="start of untrained mixers (attention)")
    add("--seed", type=int, default=0, help="of what untrained mixers draw (0)")
    add("--keep", type=int, default=1, help="how many layers are to keep their attention (1)")
    add("--rank_by", choices=list(RANKED_BY), default="kl", help="the cost that ranks (kl)")
    add("--normaliser", default="librispeech")
    add_common_options(parser, output="results/layer_importance")
    args = parser.parse_args(argv)
    found = made_and_written(report, draw_importance, "layer_importance", args)
    print(f"teacher: WER {_percent(found['teacher_wer'])} on {found['num_words']} words\n")
    print(table(found["layers"]))
    for line in remarks(found):
        print(f"\n{line}")
    print(f"\n{overrides_yaml(found['keep'])}\n")
    print(json.dumps(found))


def remarks(found: dict[str, Any]) -> list[str]:
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
    main()
