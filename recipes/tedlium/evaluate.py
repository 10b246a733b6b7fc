"""WER and CER of a model, converted or not, on splits of TED-LIUM 3, by segments or by whole talks:

python recipes/tedlium/evaluate.py results/tedlium/hybrid-seed0/model --data_folder data/TEDLIUM_release-3
python recipes/tedlium/evaluate.py results/tedlium/hybrid-seed0/model --split test --whole_talks

It writes <split>.json (the summary) and <split>.jsonl (every utterance with its edits), with --whole_talks
<split>-talks.json and <split>-talks.jsonl; it prints a table and, as its last line, the summaries as JSON.
"""

import json
from pathlib import Path

import click
import torch

from cald_speech.commands import options
from cald_speech.evaluation.recognition import evaluate_folder, evaluate_talks
from cald_speech.evaluation.report import error_rates, format_table
from cald_speech.recipes.tedlium.prepare import prepare


@options.command()
@click.argument("folder", type=options.ModelSource())
@click.option("--data_folder", type=Path, default="data/TEDLIUM_release-3", show_default=True)
@click.option("--split", "splits", multiple=True, default=["dev", "test"], show_default=True)
@click.option("--whole_talks", is_flag=True, help="Each talk is one utterance; what lies in no segment is not scored.")
@click.option("--force", is_flag=True, help="Whole talks with a model whose every layer kept attention, too.")
@options.evaluation_folder()
@options.normaliser("tedlium")
@options.max_batch_s()
@click.option("--drop_bad_audio", is_flag=True, help="Leave out what is missing or damaged instead of refusing it.")
@options.device()
@options.dtype()
def main(
    folder: str,
    data_folder: Path,
    splits: tuple[str, ...],
    whole_talks: bool,
    force: bool,
    output_folder: Path,
    normaliser: str,
    max_batch_s: float,
    drop_bad_audio: bool,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Evaluate FOLDER, a model folder or a hub id."""
    options.refuse_idle(
        max_batch_s=(not whole_talks, "segments, without --whole_talks"), force=(whole_talks, "--whole_talks")
    )
    how = {"normaliser": normaliser, "device": device, "dtype": dtype}
    manifests = prepare(
        data_folder, output_folder, splits={split: split for split in splits}, drop_bad_audio=drop_bad_audio
    )
    if whole_talks:
        places = {f"{split}-talks": manifest for split, manifest in manifests.items()}
        summaries = {
            split: evaluate_talks(folder, manifest, output_folder, split=split, force=force, **how)
            for split, manifest in places.items()
        }
    else:
        summaries = {
            split: evaluate_folder(folder, manifest, output_folder, split=split, max_batch_s=max_batch_s, **how)
            for split, manifest in manifests.items()
        }
    click.echo(format_table([error_rates(summary) for summary in summaries.values()]))
    click.echo(json.dumps(summaries))


if __name__ == "__main__":
    main()
