"""``cald-speech evaluate``: error rates of a model on a manifest."""

import json
from pathlib import Path
from typing import Any

import click
import torch

from cald_speech.commands import options
from cald_speech.evaluation.report import format_table
from cald_speech.evaluation.run import evaluate_folder


@options.command()
@click.argument("model")
@click.argument("manifest", type=Path)
@options.evaluation_folder("model")
@click.option("--beam", "beam_size", type=int, help="Beam search of this width; greedy where it is not given.")
@click.option("--kenlm", "kenlm_path", type=Path, help="An n-gram model for the beam search (.arpa or binary).")
@click.option("--normaliser", default="librispeech", show_default=True, help="Of references and hypotheses.")
@options.max_batch_s()
@options.device()
@options.dtype()
def evaluate(model: str, manifest: Path, output_folder: Path, dtype: torch.dtype, **how: Any) -> None:
    """WER and CER of MODEL (a folder or hub id) on the utterances of MANIFEST, a recipe's JSON file.

    Writes <manifest>.json, the summary, and <manifest>.jsonl, every utterance with its edits, which `report` compares.
    Prints a table and, as its last line, the summary as JSON.
    """
    summary = evaluate_folder(model, manifest, output_folder, split=manifest.stem, dtype=dtype, **how)
    click.echo(format_table([error_rates(summary)]))
    click.echo(json.dumps(summary))


def error_rates(summary: dict[str, Any]) -> dict[str, Any]:
    """The row of a report's summary in a table."""
    low, high = summary["wer_interval"] or (None, None)
    edits = {key: summary["words"][key] for key in ("count", "substitutions", "insertions", "deletions")}
    return {
        "split": summary["split"],
        "WER %": summary["wer"],
        "low": low,
        "high": high,
        "CER %": summary["cer"],
    } | edits
