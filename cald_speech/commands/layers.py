"""``cald-speech drift`` and ``layers``: what is seen of models layer by layer."""

import json
from pathlib import Path
from typing import Any

import click

from cald_speech.commands import options
from cald_speech.conversion import STARTS, load_config
from cald_speech.evaluation import drift as drift_of
from cald_speech.evaluation import layer_importance, restoring
from cald_speech.evaluation.figures import draw_drift, draw_importance, draw_restoring
from cald_speech.families import SpeechFamily, family_of
from cald_speech.files import whole_file

UTTERANCES = click.option(
    "--utterances", default=200, show_default=True, help="How many are read, evenly spread over the manifest."
)


@options.command()
@click.argument("teacher", type=options.ModelSource())
@click.argument("source", type=options.ModelSource())
@options.manifest(or_tokens=True)
@click.option("--waypoints", type=Path, help="Folder with step-<number> checkpoints of the fine-tuning.")
@UTTERANCES
@options.max_batch_s()
@options.max_batch_tokens()
@options.output_folder("results/drift", "--output")
@options.device()
@options.progress()
def drift(output_folder: Path, **what: Any) -> None:
    """How far fine-tuning moved the hidden states, layer by layer, and the guidance mode which that speaks for.

    Reads MANIFEST's audio, or the tokens of a set, with the pretrained SOURCE and the fine-tuned TEACHER (folders or
    hub ids) and prints the cosine distance between their hidden states after each layer, mean over frames or tokens;
    with --waypoints also how far each checkpoint of the fine-tuning is from both. SOURCE needs no head. The paper
    (arXiv 2410.06846) names no border between a large and a small distance: those used here are our reading.

    Writes drift.json and drift.png; prints tables, the suggestion, and one JSON line last.
    """
    hears = isinstance(family_of(load_config(what["teacher"])), SpeechFamily)
    options.refuse_idle(max_batch_s=(hears, "models of audio"), max_batch_tokens=(not hears, "models of text"))
    options.check_writable(output_folder)  # it may take an hour until there is something to write
    found = drift_of.measure_drift(**what)
    options.write_found(output_folder, "drift", found, draw_drift)
    click.echo(drift_of.tables(found))
    suggestion = found["suggestion"]
    certainty = "suggested" if suggestion["clear"] else "suggested, uncertainly"
    click.echo(f"\nguidance {certainty}: {', '.join(suggestion['modes'])}; {suggestion['reason']}.\n")
    click.echo(json.dumps(found))


@options.command()
@click.argument("teacher", type=options.ModelSource())
@options.manifest()
@click.option(
    "--student",
    type=options.ModelSource(),
    help="Converted model whose trained mixers are measured, instead of untrained ones.",
)
@click.option("--mixer", help=f"Untrained mixer: class name or JSON.  [default: {layer_importance.MIXER}]")
@click.option(
    "--initialise",
    type=click.Choice(list(STARTS)),
    default="attention",
    show_default=True,
    help="Start of untrained mixers.",
)
@click.option("--seed", default=0, show_default=True, help="Of what untrained mixers draw.")
@click.option("--keep", default=1, show_default=True, help="How many layers are to keep their attention.")
@click.option(
    "--rank_by",
    type=click.Choice(list(layer_importance.RANKED_BY)),
    default="kl",
    show_default=True,
    help="The cost that ranks.",
)
@click.option(
    "--keep_best",
    type=int,
    help="Restore attention in so many layers of the --student, one by one, each time where it helps most.",
)
@click.option("--save_to", type=Path, help="With --keep_best: a new folder for the student with these layers restored.")
@options.normaliser()
@UTTERANCES
@options.max_batch_s()
@options.output_folder("results/layer_importance", "--output")
@options.device()
@options.progress()
def layers(
    output_folder: Path,
    student: str | None,
    mixer: str | None,
    keep_best: int | None,
    save_to: Path | None,
    **what: Any,
) -> None:
    """Which layers need their attention most: what converting each layer alone costs the teacher.

    For each layer, the TEACHER (a folder or hub id) with that layer alone converted: its WER on MANIFEST, the KL of its
    output from the unconverted teacher's (nats a frame), the cosine distance of the hidden states after the layer and
    after the last one, and how many frames each head of the mixer remembers. Keep attention where conversion costs
    most. The costs of single layers need not add up.

    With --keep_best N it also goes the other way (arXiv 2512.20569): in the --student, the layer whose attention
    brings the output nearest to the teacher's gets it back, then the next, N times; prints KL and WER for 0 to N
    layers, and writes restoring.json and the map, keep_best.yaml.

    Writes layer_importance.json and .png; prints the ranking, a yaml snippet, and one JSON line last.
    """
    if keep_best is not None and student is None:
        raise click.UsageError("--keep_best restores layers of a distilled student: expected --student, got none")
    if save_to is not None and keep_best is None:
        raise click.UsageError("--save_to writes what --keep_best makes: expected --keep_best, got none")
    if student is not None and mixer is not None:
        raise click.UsageError("--student measures the mixers that it has: expected --student or --mixer, got both")
    untrained = (student is None, "untrained mixers, without --student")
    options.refuse_idle(initialise=untrained, seed=untrained)
    options.check_writable(output_folder)
    best = None
    if keep_best is not None:
        shared = {key: value for key, value in what.items() if key not in ("initialise", "seed", "keep", "rank_by")}
        best = restoring.restore_layers(student=student, keep_best=keep_best, **shared)
        _write_restored(best, output_folder, save_to)
    found = layer_importance.rank_layers(student=student, mixer=mixer or layer_importance.MIXER, **what)
    options.write_found(output_folder, "layer_importance", found, draw_importance)
    click.echo(f"{layer_importance.tables(found)}\n")
    if best is not None:
        click.echo(f"{restoring.table(best)}\n\n{output_folder / 'keep_best.yaml'} keeps them.\n")
        found |= {"restoring": best}
    click.echo(json.dumps(found))


def _write_restored(best: dict[str, Any], output_folder: Path, save_to: Path | None) -> None:
    """What restoring found, the map that keeps it, and the model where it is asked for."""
    options.write_found(output_folder, "restoring", best, draw_restoring)
    with whole_file(output_folder / "keep_best.yaml") as unfinished:
        unfinished.write_text(restoring.keep_yaml(best))
    if save_to is not None:
        restoring.save_restored(best["teacher"], best["student_folder"], best["restored"], save_to)
