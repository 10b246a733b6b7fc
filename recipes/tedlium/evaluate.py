"""WER and CER of a model, converted or not, on splits of TED-LIUM 3, by segments or by whole talks:

python recipes/tedlium/evaluate.py results/tedlium/hybrid-seed0/model --data_folder data/TEDLIUM_release-3
python recipes/tedlium/evaluate.py results/tedlium/hybrid-seed0/model --split test --whole_talks

It writes <split>.json (the summary) and <split>.jsonl (every utterance with its edits), with --whole_talks
<split>-talks.json and <split>-talks.jsonl; it prints a table and, as its last line, the summaries as JSON.
"""

import json
import sys
from pathlib import Path

import click
import torch

from cald_speech.errors import UserError
from cald_speech.evaluation.report import format_table
from cald_speech.evaluation.run import evaluate_folder
from cald_speech.evaluation.talks import evaluate_talks
from cald_speech.recipes.tedlium.prepare import prepare


@click.command()
@click.argument("folder")
@click.option("--data_folder", type=Path, default="data/TEDLIUM_release-3", show_default=True)
@click.option("--split", "splits", multiple=True, default=["dev", "test"], show_default=True)
@click.option("--whole_talks", is_flag=True, help="Each talk is one utterance; what lies in no segment is not scored.")
@click.option("--force", is_flag=True, help="Whole talks with a model whose every layer kept attention, too.")
@click.option("--output_folder", type=Path, help="Default: results/evaluation/ and the path of FOLDER, joined by --.")
@click.option("--max_batch_s", default=60.0, show_default=True, help="Seconds of audio in a batch, padding counted.")
@click.option("--drop_bad_audio", is_flag=True, help="Leave out what is missing or damaged instead of refusing it.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
def main(
    folder: str,
    data_folder: Path,
    splits: tuple[str, ...],
    whole_talks: bool,
    force: bool,
    output_folder: Path | None,
    max_batch_s: float,
    drop_bad_audio: bool,
    device: str,
    dtype: str,
) -> None:
    """Evaluate FOLDER, a model folder or a hub id."""
    # Two models never share a folder: results/a/model and results/b/model have reports of their own.
    output_folder = output_folder or Path("results/evaluation") / folder.strip("/.").replace("/", "--")
    options = {"normaliser": "tedlium", "device": device, "dtype": getattr(torch, dtype)}
    try:
        manifests = prepare(
            data_folder, output_folder, splits={split: split for split in splits}, drop_bad_audio=drop_bad_audio
        )
        if whole_talks:
            places = {f"{split}-talks": manifest for split, manifest in manifests.items()}
            summaries = {
                split: evaluate_talks(folder, manifest, output_folder, split=split, force=force, **options)
                for split, manifest in places.items()
            }
        else:
            summaries = {
                split: evaluate_folder(folder, manifest, output_folder, split=split, max_batch_s=max_batch_s, **options)
                for split, manifest in manifests.items()
            }
    except UserError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    click.echo(format_table([_row(summary) for summary in summaries.values()]))
    click.echo(json.dumps(summaries))


def _row(summary: dict) -> dict:
    low, high = summary["wer_interval"] or (None, None)
    edits = {key: summary["words"][key] for key in ("count", "substitutions", "insertions", "deletions")}
    return {
        "split": summary["split"],
        "WER %": summary["wer"],
        "low": low,
        "high": high,
        "CER %": summary["cer"],
        **edits,
    }


if __name__ == "__main__":
    main()
