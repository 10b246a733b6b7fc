"""Accuracy of a model, converted or not, on a set of VoxCeleb1's identification split:

python recipes/voxceleb/evaluate.py results/voxceleb/hybrid-seed0/model --data_folder data/voxceleb1

It writes <split>_labels.json (label and guess of every clip) and <split>.json (the summary), and prints a table and, as
its last line, the summary as JSON. The 95 % interval draws speakers, since what one speaker says is not independent.
"""

import json
from pathlib import Path

import click

from cald_speech.commands import options
from cald_speech.conversion.model_card import add_figure
from cald_speech.data.manifests import manifest_hash
from cald_speech.evaluation.labels import classify_folder, summarise
from cald_speech.evaluation.report import format_table
from cald_speech.files import whole_file
from cald_speech.recipes.voxceleb.prepare import SPLITS, prepare


@options.command()
@click.argument("folder", type=options.ModelSource())
@click.option("--data_folder", type=Path, default="data/voxceleb1", show_default=True)
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True)
@options.evaluation_folder()
@options.max_batch_s()
@click.option("--drop_bad_audio", is_flag=True, help="Leave out what is missing or damaged instead of refusing it.")
@options.device()
def main(folder: str, data_folder: Path, split: str, output_folder: Path, drop_bad_audio: bool, **how) -> None:
    """Evaluate FOLDER, a model folder or a hub id."""
    manifest = prepare(data_folder, output_folder, splits=[split], drop_bad_audio=drop_bad_audio)[split]
    found = classify_folder(folder, manifest, output_folder / f"{split}_labels.json", **how)
    speakers = [label for label, _ in found.values()]
    summary = {"model": folder, "split": split, **summarise(found, drawn_by=speakers)}
    summary["manifest_hash"] = manifest_hash(manifest)
    with whole_file(output_folder / f"{split}.json") as unfinished:
        unfinished.write_text(json.dumps(summary, indent=1) + "\n")
    add_figure(
        Path(folder),
        split,
        metric="accuracy %",
        value=summary["accuracy"],
        interval=summary["interval"],
        count=len(found),
        manifest_hash=summary["manifest_hash"],
    )
    low, high = summary["interval"] or (None, None)
    row = {"split": split, "accuracy %": summary["accuracy"], "low": low, "high": high, "clips": len(found)}
    click.echo(format_table([row | {"speakers": len(set(speakers))}]))
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
