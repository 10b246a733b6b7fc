"""Accuracy of a classifier of text, converted or not, on a set of QNLI, QQP, SST-2 or IMDB:

python recipes/glue/evaluate.py results/glue/sst2-target-none-seed0/model --glue_task sst2 --split valid

It writes <task>-<split>.json (the summary) and <task>-<split>-guesses.json (label and guess of every row), adds the
figure to the model's card, and prints a table and, as its last line, the summary as JSON.
"""

import json
from pathlib import Path

import click
import torch

from cald_speech.commands import options
from cald_speech.conversion.model_card import add_figure
from cald_speech.data.tables import table_hash
from cald_speech.errors import UserError
from cald_speech.evaluation.labels import classify_table, summarise
from cald_speech.evaluation.report import format_table
from cald_speech.files import whole_file
from cald_speech.recipes.glue.corpora import CORPORA, HUB
from cald_speech.recipes.glue.prepare import prepare


@options.command()
@click.argument("folder", type=options.ModelSource())
@click.option("--glue_task", type=click.Choice(list(CORPORA)), required=True)
@click.option("--data_folder", type=Path, default=HUB, show_default=True, help="A folder, or hub: download it.")
@click.option("--prepare_folder", type=Path, default="results/glue/data", show_default=True)
@click.option("--split", default="valid", show_default=True, help="GLUE has no labels of its test sets; imdb has test.")
@options.evaluation_folder()
@click.option("--max_tokens", default=512, show_default=True, help="Longer texts are cut.")
@click.option("--max_batch_tokens", default=16384, show_default=True, help="Tokens in a batch, padding counted.")
@options.device()
@options.dtype()
def main(
    folder: str,
    glue_task: str,
    data_folder: Path,
    prepare_folder: Path,
    split: str,
    output_folder: Path,
    dtype: torch.dtype,
    **how,
) -> None:
    """Evaluate FOLDER, a model folder or a hub id."""
    name = f"{glue_task}-{split}"
    tables = prepare(data_folder, prepare_folder, task=glue_task)
    if split not in tables:
        raise UserError(f"split: expected one of {', '.join(tables)}, which {glue_task} has, got {split!r}")
    report = output_folder / f"{name}-guesses.json"
    found = classify_table(folder, tables[split], report, dtype=dtype, **how)
    summary = {"model": folder, "set": name, **summarise(found), "manifest_hash": table_hash(tables[split])}
    with whole_file(output_folder / f"{name}.json") as unfinished:
        unfinished.write_text(json.dumps(summary, indent=1) + "\n")
    figure = {"metric": "accuracy %", "value": summary["accuracy"], "interval": summary["interval"]}
    figure |= {"dtype": str(dtype).removeprefix("torch.")}
    add_figure(Path(folder), name, **figure, count=len(found), manifest_hash=summary["manifest_hash"])
    low, high = summary["interval"] or (None, None)
    click.echo(
        format_table([{"set": name, "accuracy %": summary["accuracy"], "low": low, "high": high, "of": len(found)}])
    )
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
