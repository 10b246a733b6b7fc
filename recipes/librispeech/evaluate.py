"""WER and CER of a model, converted or not, on a split of LibriSpeech:

python recipes/librispeech/evaluate.py results/mamba/model --data_folder data/LibriSpeech --split test-clean

It writes <split>.json (the summary) and <split>.jsonl (every utterance with its edits), and prints a table and, as its
last line, the summary as JSON.
"""

import json
from pathlib import Path
from typing import Any

import click

from cald_speech.commands import options
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.evaluation.report import error_rates, format_table
from cald_speech.recipes.librispeech.prepare import prepare


@options.command()
@click.argument("folder", type=options.ModelSource())
@click.option("--data_folder", type=Path, default="data/LibriSpeech", show_default=True)
@click.option("--split", default="test-clean", show_default=True)
@options.evaluation_folder()
@options.beam_search()
@options.normaliser(None)
@options.max_batch_s()
@options.device()
@options.dtype()
def main(folder: str, data_folder: Path, split: str, output_folder: Path, **how: Any) -> None:
    """Evaluate FOLDER, a model folder or a hub id."""
    manifest = prepare(data_folder, output_folder, {split: [split]})[split]
    summary = evaluate_folder(folder, manifest, output_folder, split=split, **how)
    click.echo(format_table([error_rates(summary)]))
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
