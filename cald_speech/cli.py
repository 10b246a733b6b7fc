"""``cald-speech``: what needs no recipe (floor F7)."""

import sys
from pathlib import Path

import click

from cald_speech.errors import UserError


class FriendlyGroup(click.Group):
    """Prints what a user can mend as one paragraph, without a traceback, and exits with status 2."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)


@click.group(cls=FriendlyGroup)
@click.version_option(package_name="cald-speech")
def main() -> None:
    """Convert pretrained transformers of speech and text to linear-time models."""


@main.command()
@click.argument("model")
@click.argument("folder", type=Path)
@click.option("--initialise", type=click.Choice(["attention", "random"]), default="attention", show_default=True)
@click.option("--keep", type=int, multiple=True, help="A layer (from 0) that keeps its attention; may be repeated.")
@click.option("--share/--separate", default=True, show_default=True, help="One projection for both directions, or two.")
@click.option("--head", help="Which of its heads to keep; default: ctc for speech, masked_lm or lm for text.")
def convert(model: str, folder: Path, initialise: str, keep: tuple[int, ...], share: bool, head: str | None) -> None:
    """Convert MODEL (a folder or hub id) to Mamba-2, untrained, into FOLDER: bidirectional, unless it is causal."""
    from functools import partial

    from transformers import AutoProcessor

    import cald_speech
    from cald_speech.conversion import load_config
    from cald_speech.conversion.model_card import update_facts
    from cald_speech.families import family_of
    from cald_speech.mixers import Bidirectional, Mamba2

    family = family_of(load_config(model))
    head = head or family.default_head
    student = cald_speech.from_pretrained(model, head=head)
    mixer = Mamba2 if family.causal else partial(Bidirectional, share_projections=share)
    layer_map = cald_speech.LayerMap(mixer, dict.fromkeys(keep))
    report = cald_speech.convert(student, layer_map, initialise=initialise)
    student.save_pretrained(folder)
    AutoProcessor.from_pretrained(model).save_pretrained(folder)
    layers = report.describe_layers()
    facts = {"model": type(student).__name__, "teacher": model, "pipeline": family.pipelines[head]}
    update_facts(folder, **facts, layers=layers, guidance="none: not trained yet")
    click.echo(report)


@main.command()
@click.argument("model")
@click.argument("manifest", type=Path)
@click.option("--output_folder", type=Path, default="results/evaluation", show_default=True)
def evaluate(model: str, manifest: Path, output_folder: Path) -> None:
    """WER and CER of MODEL (a folder or hub id) on the utterances of MANIFEST, a recipe's JSON file."""
    from cald_speech.evaluation.report import format_table
    from cald_speech.evaluation.run import evaluate_folder

    summary = evaluate_folder(model, manifest, output_folder, split=manifest.stem)
    click.echo(
        format_table([{key: summary[key] for key in ("split", "wer", "cer", "num_utterances", "manifest_hash")}])
    )


@main.command()
def doctor() -> None:
    """Which backend every op gets on this machine and why, the versions, and what is broken with what mends it.

    The exit status is 1 where something that is required is broken.
    """
    from cald_speech.doctor import diagnose

    report, sound = diagnose()
    click.echo(report)
    sys.exit(0 if sound else 1)


@main.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def transcribe(arguments: tuple[str, ...]) -> None:
    """Transcribe audio of any length in one exact pass; --help tells the options."""
    from cald_speech.longform.command import main as run

    sys.exit(run(arguments, prog="cald-speech transcribe"))
