"""One experiment of the digits with one mixer and another, at equal steps:

    python recipes/digits/mixers.py hparams/digits/cue.yaml --output_folder results/digits_cue/mixers
    python recipes/digits/evaluate.py results/digits_cue/teacher/model results/digits_cue/mixers/*/model --cue

Target guidance; a schedule that ends with the steps. Stopped and started again, it goes on where it was
(recipes/grid.py). The last line names the models.
"""

import json
from pathlib import Path

import click

from cald_speech.commands.options import command
from cald_speech.recipes.grid import MIXERS, Cell, Grid, schedule


@command()
@click.argument("experiment", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--steps", default=400, show_default=True)
@click.option("--seed", type=int, multiple=True, default=(0,), show_default=True, help="May be repeated.")
@click.option("--mixer", type=click.Choice(list(MIXERS)), multiple=True, help="May be repeated; default: all.")
@click.option("--data_folder", type=Path, default="data/fsdd", show_default=True)
@click.option("--output_folder", type=Path, required=True, help="Each student has a folder in it.")
def main(
    experiment: Path,
    steps: int,
    seed: tuple[int, ...],
    mixer: tuple[str, ...],
    data_folder: Path,
    output_folder: Path,
) -> None:
    """Train EXPERIMENT's student with each mixer and seed."""
    keys = {"guidance": "target", "schedule": schedule(steps)}
    cells = {name: Cell(steps, keys, mixer=MIXERS[name]) for name in mixer or MIXERS}
    grid = Grid(str(experiment), cells, seed, data_folder, output_folder)
    grid.train_all(jobs=1)
    click.echo(json.dumps([str(grid.folder_of(name, one) / "model") for name in cells for one in seed]))


if __name__ == "__main__":
    main()
