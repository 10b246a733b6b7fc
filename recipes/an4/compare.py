"""Modes, mixers, steps and shares of the labels on AN4, three seeds each (cells.py), beside both teachers.

    python recipes/an4/compare.py --jobs 2

Stopped and started again, it goes on where it was (recipes/grid.py). Every WER is that of the 773 test words, with a
95 % interval, and its difference from the teacher with a paired one, over utterances. Mode and mixer are chosen by the
dev speakers alone. Results and figures go to results/an4/grid; the last line is one JSON list.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cald_speech.commands.options import command
from cald_speech.errors import UserError
from cald_speech.recipes.an4.cells import candidates, make_cells
from cald_speech.recipes.an4.prepare import prepare
from cald_speech.recipes.grid import Grid, grid_options, with_stages
from cald_speech.recipes.grid_table import summarise

TEACHER, SCRATCH = Path("results/an4/teacher"), Path("results/an4/teacher_scratch")


@command()
@grid_options("data/an4", "results/an4/grid", 400, " that does not say otherwise")
def main(
    data_folder: Path,
    output_folder: Path,
    only: Sequence[str],
    seeds: str,
    repeat: Sequence[str],
    steps: int,
    jobs: int,
) -> None:
    """Train and compare the cells of the grid."""
    cells = with_stages(make_cells(steps), only)
    if not (TEACHER / "model").is_dir():
        raise UserError(
            f"expected AN4's teacher in {TEACHER}, but it is not there. Train it: python recipes/an4/train.py "
            "hparams/an4/teacher.yaml"
        )
    data = Path("results/an4/data")
    test = prepare(data_folder, data)["test"]  # not twice at once, by the first trainings
    if any("share" in cell.keys.get("corpus", "") for cell in cells.values()):
        prepare(data_folder, data, share=0.1)
    numbers = [int(seed) for seed in seeds.split(",")]
    grid = Grid("hparams/an4/student.yaml", cells, numbers, data_folder, output_folder, repeat or None)
    grid.train_all(jobs)
    teachers = {"teacher": TEACHER} | ({"teacher from scratch": SCRATCH} if (SCRATCH / "model").is_dir() else {})
    rows = summarise(list(grid.evaluated(test)), output_folder, teachers, test)
    chosen = choose(rows, candidates(steps))
    print("\n".join(f"chosen by the dev speakers, {of}: {name or 'no candidate'}" for of, name in chosen.items()))
    print(json.dumps([*rows, {"chosen": chosen}]))


def choose(rows: Sequence[Mapping[str, Any]], is_global: Mapping[str, bool]) -> dict[str, str | None]:
    """The candidate with the lowest WER on the dev speakers, of all and of those with a global mixer.

    Example
    -------
    >>> rows = [{"model": name, "valid WER %": rate} for name, rate in (("target", 5.0), ("window", 4.0))]
    >>> choose(rows, {"target": True, "window": False})
    {'of all': 'window', 'of global mixers': 'target'}
    """
    best: dict[str, str | None] = {}
    for of, wanted in (("of all", {True, False}), ("of global mixers", {True})):
        among = [row for row in rows if is_global.get(row["model"]) in wanted]
        best[of] = min(among, key=lambda row: row["valid WER %"])["model"] if among else None
    return best


if __name__ == "__main__":
    main()
