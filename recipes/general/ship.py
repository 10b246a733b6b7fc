"""The trained teacher as it ships: float16, with its card and its curve.

python recipes/general/ship.py recipes/general/teacher results/general/start results/general/teacher_end
"""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from transformers import AutoModelForCTC, AutoProcessor

from cald_speech.commands.options import command
from cald_speech.conversion.model_card import read_facts, update_facts
from cald_speech.errors import UserError
from cald_speech.files import whole_file

COLUMNS = ("loss/task", "valid/WER")


def ship(folder: Path, runs: Sequence[Path]) -> None:
    """Write the best model of the last of `runs` into `folder`, and curve.tsv: loss and validation WER of all of them.

    Raises: UserError, where a run has no model or no log.
    """
    for path in (*(run / "train_log.jsonl" for run in runs), runs[-1] / "model" / "config.json"):
        if not path.is_file():
            raise UserError(f"expected {path}, which a training writes, but it is not there. Give its output_folder.")
    model = runs[-1] / "model"
    AutoModelForCTC.from_pretrained(model, dtype=torch.float16).save_pretrained(folder)
    AutoProcessor.from_pretrained(model).save_pretrained(folder)
    update_facts(folder, **read_facts(model))
    with whole_file(folder / "curve.tsv") as unfinished:
        unfinished.write_text("\n".join(_curve(runs)) + "\n")


def _curve(runs: Sequence[Path]) -> list[str]:
    lines = ["\t".join(("run", "step", *COLUMNS))]
    for run in runs:
        for entry in map(json.loads, (run / "train_log.jsonl").read_text().splitlines()):
            values = (f"{entry[column]:.4g}" if column in entry else "" for column in COLUMNS)
            lines.append("\t".join((run.name, str(entry["step"]), *values)))
    return lines


@command()
@click.argument("folder", type=Path)
@click.argument("runs", nargs=-1, required=True, type=Path)
def main(folder: Path, runs: tuple[Path, ...]) -> None:
    """Write the model of the last of RUNS, output folders in the order they were trained, into FOLDER."""
    ship(folder, runs)
    click.echo(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
