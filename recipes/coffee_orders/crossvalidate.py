"""Spoken intent over all orders: five folds, each tested with models that never heard it; teacher, guided, unguided.

    python recipes/coffee_orders/crossvalidate.py --jobs 2

Stopped and started again, it goes on where it was. Prints a table, and one JSON line last.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from cald_speech.commands.options import command
from cald_speech.evaluation.labels import classify_folder
from cald_speech.evaluation.report import format_table
from cald_speech.recipes import train_apart
from cald_speech.recipes.coffee_orders.prepare import NUM_FOLDS, prepare
from cald_speech.recipes.paired_labels import label_rows

RESULTS = Path("results/coffee")
MODELS = {"teacher": "teacher.yaml", "target": "student.yaml", "unguided": "student.yaml"}
PLUMBING = 60.0  # a teacher below this accuracy says nothing about conversion


@command()
@click.option("--data_folder", type=Path, default="data/coffee_orders", show_default=True)
@click.option("--jobs", default=1, show_default=True, help="Folds at once, one thread each.")
def main(data_folder: Path, jobs: int) -> None:
    """Cross-validate teacher and students."""
    tests = [prepare(data_folder, RESULTS / "data", fold=fold)["test"] for fold in range(NUM_FOLDS)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda fold: _train_fold(fold, data_folder), range(NUM_FOLDS)))
    found: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in MODELS}
    for name in MODELS:
        for fold, test in enumerate(tests):
            folder = RESULTS / f"{name}-fold{fold}"
            found[name] |= classify_folder(folder / "model", test, folder / "test.json")
    rows = label_rows({name: [of] for name, of in found.items()})
    print(format_table(rows))
    if rows[1]["accuracy %"] < PLUMBING:
        print(f"plumbing: the teacher is below {PLUMBING:.0f} %, so this says nothing about conversion")
    print(json.dumps(rows))


def _train_fold(fold: int, data_folder: Path) -> None:
    """Teacher first; a run that has ended ends at once."""
    for name, experiment in MODELS.items():
        folder = RESULTS / f"{name}-fold{fold}"
        words = [f"--data_folder={data_folder}", f"--fold={fold}", f"--output_folder={folder}"]
        words += [] if name == "teacher" else [f"--guidance={name}"]
        train_apart(f"hparams/coffee_orders/{experiment}", folder, words)


if __name__ == "__main__":
    main()
