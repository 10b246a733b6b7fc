"""Spoken orders in five folds, each tested with models that never heard it: teacher, guided, unguided.

    python recipes/coffee_orders/crossvalidate.py --jobs 2
    python recipes/coffee_orders/crossvalidate.py --jobs 2 --slots

The first tells the drink (intent), with --slots all six slots: then an order is right if all are, and SLU-F1 says how
near they come. Folds may share speakers, for the corpus does not say who speaks. Stopped and started again, it goes on
where it was. Prints a table, and one JSON line last.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from cald_speech.commands.options import command
from cald_speech.evaluation.labels import classify_folder
from cald_speech.evaluation.report import format_table
from cald_speech.recipes import train_apart
from cald_speech.recipes.coffee_orders.prepare import NUM_FOLDS, entities_of, prepare
from cald_speech.recipes.paired_labels import Guesses, label_rows
from cald_speech.recipes.slurp.entities import slu_f1

MODELS = ("teacher", "target", "unguided")
PLUMBING = 40.0  # a teacher below this accuracy says nothing about conversion


@command()
@click.option("--data_folder", type=Path, default="data/coffee_orders", show_default=True)
@click.option("--output_folder", type=Path, default="results/coffee", show_default=True)
@click.option("--source", help="What teachers start from; default: as teacher.yaml says.")
@click.option("--slots", is_flag=True, help="All six slots in the place of the drink.")
@click.option("--jobs", default=1, show_default=True, help="Folds at once, one thread each.")
def main(data_folder: Path, output_folder: Path, source: str | None, slots: bool, jobs: int) -> None:
    """Cross-validate teacher and students."""
    data = output_folder / "data"
    tests = [prepare(data_folder, data, fold=fold, slots=slots)["test"] for fold in range(NUM_FOLDS)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda fold: train_fold(fold, data_folder, output_folder, source, slots), range(NUM_FOLDS)))
    found: dict[str, Guesses] = {name: {} for name in MODELS}
    for name in MODELS:
        for fold, test in enumerate(tests):
            folder = folder_of(output_folder, name, fold, slots)
            found[name] |= classify_folder(folder / "model", test, folder / "test.json")
    rows = label_rows({name: [of] for name, of in found.items()})
    print(format_table(rows))
    if not slots and rows[1]["accuracy %"] < PLUMBING:
        print(f"plumbing: the teacher is below {PLUMBING:.0f} %, so this says nothing about conversion")
    entities = entity_rows(found) if slots else []
    if slots:
        print(f"\n{format_table(entities)}")
    print(json.dumps([*rows, *entities]))


def folder_of(output_folder: Path, name: str, fold: int, slots: bool) -> Path:
    """Where a model lives."""
    return output_folder / f"{'slots-' if slots else ''}{name}-fold{fold}"


def train_fold(fold: int, data_folder: Path, output_folder: Path, source: str | None, slots: bool) -> None:
    """Teacher first; a run that has ended ends at once."""
    teacher = folder_of(output_folder, "teacher", fold, slots)
    for name in MODELS:
        folder = folder_of(output_folder, name, fold, slots)
        words = [f"--data_folder={data_folder}", f"--fold={fold}", f"--output_folder={folder}"]
        words.append(f"--prepare_folder={output_folder / 'data'}")
        if name != "teacher":
            words += [f"--guidance={name}", f"--teacher={teacher / 'model'}"]
        elif source is not None:
            words.append(f"--source={source}")
        experiment = f"{'slots_' if slots else ''}{'teacher' if name == 'teacher' else 'student'}.yaml"
        train_apart(f"hparams/coffee_orders/{experiment}", folder, words)


def entity_rows(found: dict[str, Guesses]) -> list[dict]:
    """SLU-F1 of each model over all orders, and its F1 of words and of characters."""
    return [
        {"model": name} | slu_f1({key: tuple(map(entities_of, pair)) for key, pair in of.items()})
        for name, of in found.items()
    ]


if __name__ == "__main__":
    main()
