"""Every guidance mode from one teacher, on text: the students' losses on the test set beside the teacher's.

    python recipes/pile/compare.py hparams/pile/stdlib.yaml

The experiment names teacher and source, which must have been trained. Stopped and started again, it goes on where it
was. Prints a table, and one JSON line last.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from cald_speech.commands.options import command
from cald_speech.evaluation.language import Perplexity, perplexity_of
from cald_speech.evaluation.report import format_table
from cald_speech.recipes import train_apart
from cald_speech.recipes.pile.prepare import prepare
from cald_speech.tasks.bootstrap import paired_bootstrap
from cald_speech.training.settings import Settings

MODES = ("unguided", "target", "hybrid", "trajectory", "waypoint")


@command()
@click.argument("experiment", type=Path)
@click.option("--data_folder", help="Default: the experiment's.")
@click.option("--modes", default=",".join(MODES), show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--jobs", default=1, show_default=True, help="Runs at once, one thread each.")
def main(experiment: Path, data_folder: str | None, modes: str, seeds: str, jobs: int) -> None:
    """Train the students of EXPERIMENT and compare them with its teacher."""
    given = {} if data_folder is None else {"data_folder": data_folder}
    runs = [(mode, seed) for seed in seeds.split(",") for mode in modes.split(",")]
    with ThreadPoolExecutor(jobs) as pool:
        folders = dict(zip(runs, pool.map(lambda run: _train(experiment, given, *run), runs), strict=True))
    settings = Settings.load(experiment, given)
    folders_of_data = Path(settings.data_folder), Path(settings.prepare_folder or settings.output_folder)
    tokens = prepare(*folders_of_data, **settings.corpus)["test"]
    teacher = perplexity_of(settings.teacher, tokens)[0]
    found = {run: perplexity_of(str(folder / "model"), tokens)[0] for run, folder in folders.items()}
    rows = summarise(teacher, found)
    print(format_table(rows))
    print(json.dumps(rows))


def _train(experiment: Path, given: dict[str, str], mode: str, seed: str) -> Path:
    """A student's folder; a run that has ended ends at once."""
    keys = given | {"guidance": mode, "seed": int(seed)}
    folder = Path(Settings.load(experiment, keys).output_folder)
    train_apart(experiment, folder, [f"--{key}={value}" for key, value in keys.items()])
    return folder


def summarise(teacher: Perplexity, found: dict[tuple[str, str], Perplexity]) -> list[dict]:
    """A row for the teacher and one for each mode: mean nats over seeds, their spread, and the loss over the teacher's.

    The interval is of the loss over the teacher's, of the seeds' mean on each block, drawn over blocks.
    """
    rows = [{"model": "teacher", "nats": teacher.loss, "perplexity": teacher.value}]
    for mode in dict.fromkeys(mode for mode, _ in found):
        seeds = [of for (name, _), of in found.items() if name == mode]
        losses = [of.loss for of in seeds]
        mean = sum(losses) / len(losses)
        blocks = [sum(nats) / len(seeds) for nats in zip(*(of.nats for of in seeds), strict=True)]
        _, low, high = (value / teacher.loss for value in paired_bootstrap(blocks, teacher.nats, teacher.counts))
        row = {"model": mode, "nats": mean, "perplexity": math.exp(mean), "low seed": min(losses)}
        row |= {"high seed": max(losses), "over teacher %": 100 * (mean / teacher.loss - 1)}
        rows.append(row | {"low %": low, "high %": high, "seeds": len(seeds)})
    return rows


if __name__ == "__main__":
    main()
