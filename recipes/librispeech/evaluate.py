"""WER and CER of a model, converted or not, on a split of LibriSpeech:

python recipes/librispeech/evaluate.py results/mamba/model --data_folder data/LibriSpeech --split test-clean

It writes <split>.json (the summary) and <split>.jsonl (every utterance with its edits), and prints a table and, as its
last line, the summary as JSON.
"""

import json
import sys
from pathlib import Path

import click
import torch

from cald_speech.errors import UserError
from cald_speech.evaluation.report import format_table
from cald_speech.evaluation.run import evaluate_folder
from cald_speech.recipes.librispeech.prepare import prepare


@click.command()
@click.argument("folder")
@click.option("--data_folder", type=Path, default="data/LibriSpeech", show_default=True)
@click.option("--split", default="test-clean", show_default=True)
@click.option("--output_folder", type=Path, help="Default: results/evaluation/ and the path of FOLDER, joined by --.")
@click.option("--beam", "beam_size", type=int, help="Beam search of this width; greedy where it is not given.")
@click.option("--kenlm", "kenlm_path", type=Path, help="An n-gram model for the beam search (.arpa or binary).")
@click.option("--max_batch_s", default=60.0, show_default=True, help="Seconds of audio in a batch, padding counted.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
def main(folder: str, data_folder: Path, split: str, output_folder: Path | None, dtype: str, **options) -> None:
    """Evaluate FOLDER, a model folder or a hub id."""
    # Two models never share a folder: results/a/model and results/b/model have reports of their own.
    output_folder = output_folder or Path("results/evaluation") / folder.strip("/.").replace("/", "--")
    try:
        manifest = prepare(data_folder, output_folder, {split: [split]})[split]
        summary = evaluate_folder(folder, manifest, output_folder, split=split, dtype=getattr(torch, dtype), **options)
    except UserError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    low, high = summary["wer_interval"] or (None, None)
    edits = {key: summary["words"][key] for key in ("count", "substitutions", "insertions", "deletions")}
    row = {"split": split, "WER %": summary["wer"], "low": low, "high": high, "CER %": summary["cer"], **edits}
    click.echo(format_table([row]))
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
