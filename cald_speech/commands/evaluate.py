"""Figures: ``cald-speech evaluate``, ``labels``, ``perplexity``, ``by-length``, ``lookahead`` and ``report``."""

import json
from pathlib import Path
from typing import Any

import click
import torch

from cald_speech.commands import options
from cald_speech.data.manifests import manifest_hash
from cald_speech.evaluation.by_length import evaluate_by_length
from cald_speech.evaluation.figures import draw_by_length
from cald_speech.evaluation.labels import classify_folder, group_names, summarise
from cald_speech.evaluation.language import evaluate_language
from cald_speech.evaluation.lookahead import evaluate_lookaheads
from cald_speech.evaluation.page import write_page
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.evaluation.report import compare_reports, error_rates, format_table
from cald_speech.tasks.reading import READERS


@options.command()
@click.argument("model", type=options.ModelSource())
@options.manifest()
@options.evaluation_folder("model")
@options.beam_search()
@options.normaliser(None)
@options.target_lang()
@options.max_batch_s()
@options.device()
@options.dtype("Of the weights; int8: of the layers' linear maps, on a CPU.", int8=True)
@options.progress()
def evaluate(model: str, manifest: Path, output_folder: Path, dtype: torch.dtype, **how: Any) -> None:
    """WER and CER of MODEL (a folder or hub id) on the utterances of MANIFEST, a corpus in any format.

    That is a recipe's JSON file, a table, a folder and more: docs/howto/own_data.md.

    Writes <manifest>.json, the summary, and <manifest>.jsonl, every utterance with its edits, which `report` compares.
    Prints a table and, as its last line, the summary as JSON.
    """
    summary = evaluate_folder(model, manifest, output_folder, split=manifest.stem, dtype=dtype, **how)
    click.echo(format_table([error_rates(summary)]))
    click.echo(json.dumps(summary))


@options.command()
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=Path)
@click.option("--split", help="Which of the folders' reports. Default: the only one; with --html: all.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write this page instead of a table.")
@click.option(
    "--utterances",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="With --html: of each set at most, the worst.",
)
@click.option(
    "--audio_mib",
    type=click.FloatRange(min=0),
    default=8.0,
    show_default=True,
    help="With --html: of the page, for the sound of the worst utterances.",
)
def report(folders: tuple[Path, ...], split: str | None, html: Path | None, **page: Any) -> None:
    """A table of evaluations, each FOLDER the --output_folder of one; or, with --html, a page to look at.

    Beside every WER stands its 95 % interval, by bootstrap over utterances, and its difference from the first folder's,
    paired over the same utterances: where the interval of a difference includes 0, the two are not told apart. The last
    line is the table as JSON.

    With --html FILE each FOLDER may also be that of a training run, what drift, layers, by-length or lookahead wrote,
    or a folder around such. The page is one file that needs no network: curves, the table, every utterance's edits
    with its sound, figures of layers. The last line is what is in it, as JSON.
    """
    options.refuse_idle(**dict.fromkeys(page, (html is not None, "--html")))
    if html is not None:
        written = write_page(folders, html, split=split, **page)
        click.echo(f"{html}: {written['bytes'] / 2**20:.1f} MiB; open it in a browser")
        click.echo(json.dumps(written))
        return
    rows = compare_reports(folders, split)
    click.echo(format_table(rows))
    click.echo(json.dumps(rows))


@options.command()
@click.argument("model", type=options.ModelSource())
@options.manifest()
@click.option("--report", type=Path, help="Where label and guess of each utterance go. Default: beside the model.")
@options.max_batch_s()
@options.device()
def labels(model: str, manifest: Path, report: Path | None, max_batch_s: float, device: str) -> None:
    """Accuracy of MODEL, a classifier, on the utterances of MANIFEST, a corpus in any format whose "text" is the label.

    Prints one JSON line: how many are right, of how many, the accuracy in percent and its 95 % bootstrap interval;
    where the head has several groups of labels, the accuracy in each of them too.
    """
    report = report or Path(model).parent / f"{manifest.stem}_labels.json"
    found = classify_folder(model, manifest, report, max_batch_s=max_batch_s, device=device)
    click.echo(json.dumps({"model": model, **summarise(found, group_names(model))}))


@options.command()
@click.argument("model", type=options.ModelSource())
@click.argument("tokens", type=Path)
@options.max_batch_tokens()
@options.device()
def perplexity(model: str, tokens: Path, max_batch_tokens: int, device: str) -> None:
    """Perplexity of MODEL, a language model, on TOKENS, a token set's JSON file as recipes/pile prepares it.

    Prints one JSON line: the perplexity with its 95 % bootstrap interval over blocks and, for a causal model, whether
    what it generates can be trusted.
    """
    click.echo(json.dumps(evaluate_language(model, tokens, device=device, max_batch_tokens=max_batch_tokens)))


@options.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=options.ModelSource())
@options.manifest("--manifest", meaning="Utterances to join, with their texts: a corpus in any format.")
@click.option(
    "--joins",
    type=options.Listed(click.INT),
    default="1,2,4,8,16,32,64",
    show_default=True,
    help="Utterances of a recording.",
)
@click.option("--utterances", default=512, show_default=True, help="Of each condition, however they are joined.")
@click.option(
    "--readers",
    type=options.Listed(click.Choice(list(READERS))),
    default="long-form",
    show_default=True,
    help="In one forward pass, the same in bounded memory, or cut into overlapping pieces.",
)
@click.option("--only", default="", help="The conditions with these words in their names alone: 'pauses to 0.5 s'.")
@options.normaliser()
@options.output_folder("results/by_length")
@options.device()
@options.progress()
def by_length(models: tuple[str, ...], manifest: Path, output_folder: Path, **how: Any) -> None:
    """WER of MODELs against duration, and under stress: do they read long recordings?

    Utterances of a manifest are joined x 1, x 2, x 4, ... with short pauses, and with pauses of 0.5 to 30 s. Every
    model reads the same recordings. Writes by_length.json and by_length.png; prints a table, and one JSON line last.
    """
    options.check_writable(output_folder)
    rows = evaluate_by_length(models, manifest, **how)
    options.write_found(output_folder, "by_length", rows, draw_by_length)
    click.echo(format_table(rows))
    click.echo(json.dumps({"manifest": manifest_hash(manifest)[:12], "rows": rows}))


@options.command()
@click.argument("model", type=options.ModelSource())
@options.manifest("--manifest", meaning="Utterances to join, with their texts: a corpus in any format.")
@click.option(
    "--lookaheads_s",
    type=options.Listed(click.FloatRange(min=0)),
    default="0,0.25,0.5,1,2,4",
    show_default=True,
    help="Seconds.",
)
@click.option("--join", default=8, show_default=True, help="Utterances of a recording.")
@click.option("--utterances", default=256, show_default=True, help="In all.")
@options.normaliser()
@options.output_folder("results/lookahead")
@options.device()
def lookahead(model: str, manifest: Path, output_folder: Path, **how: Any) -> None:
    """WER of MODEL, a bidirectional student, run live: against the seconds that its backward scans hear first.

    Utterances are joined with short pauses, and read live with each lookahead in turn; `whole` is one pass over the
    whole recording. With each lookahead stands the latency from the end of a frame's audio to its logits, the size of
    the chunks and the time to compute not counted. Writes lookahead.json; prints a table, and one JSON line last.
    """
    options.check_writable(output_folder)
    rows = evaluate_lookaheads(model, manifest, **how)
    options.write_found(output_folder, "lookahead", rows)
    click.echo(format_table(rows))
    click.echo(json.dumps({"model": model, "manifest": manifest_hash(manifest)[:12], "rows": rows}))
