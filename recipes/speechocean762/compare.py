"""Teacher, target guided and unguided students on speechocean762, three seeds each: gender, age, speaker.

    python recipes/speechocean762/compare.py --jobs 2

Stopped and started again, it goes on where it was. For each label a table of accuracies with 95 % intervals, and whom
the student alone and the teacher alone got right; gender and age draw speakers, who are the test set's own, speaker
draws utterances. The last line is JSON.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from cald_speech.commands.options import command
from cald_speech.data.manifests import read_manifest
from cald_speech.evaluation.labels import classify_folder
from cald_speech.evaluation.report import format_table
from cald_speech.recipes import train_once
from cald_speech.recipes.paired_labels import label_rows
from cald_speech.recipes.speechocean762.prepare import LABELS, prepare

RESULTS = Path("results/speechocean762")
MODES = ("target", "unguided")


@command()
@click.option("--data_folder", type=Path, default="data/speechocean762", show_default=True)
@click.option("--label", "labels", type=click.Choice(LABELS), multiple=True, default=LABELS, show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the students; the teacher has one.")
@click.option("--jobs", default=1, show_default=True, help="Trainings at once, one thread each.")
def main(data_folder: Path, labels: Sequence[str], seeds: str, jobs: int) -> None:
    """Train and compare."""
    tests = {label: prepare(data_folder, RESULTS / "data", label=label)["test"] for label in labels}
    numbers = [int(seed) for seed in seeds.split(",")]
    runs = [(label, mode, seed) for label in labels for mode in MODES for seed in numbers]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda label: train_one(data_folder, label), labels))
        list(pool.map(lambda run: train_one(data_folder, *run), runs))
    tables = {}
    for label, test in tests.items():
        folders = {"teacher": [folder_of(label)]}
        folders |= {mode: [folder_of(label, mode, seed) for seed in numbers] for mode in MODES}
        found = {
            name: [classify_folder(folder / "model", test, folder / "test.json") for folder in of]
            for name, of in folders.items()
        }
        speakers = {key: entry["speaker"] for key, entry in read_manifest(test).items()}
        tables[label] = label_rows(found, drawn_by=None if label == "speaker" else speakers)
        print(f"{label}\n\n{format_table(tables[label])}\n")
    print(json.dumps(tables))


def folder_of(label: str, mode: str | None = None, seed: int = 0) -> Path:
    """Where a model lives; without a mode the teacher."""
    return RESULTS / (f"{label}-teacher" if mode is None else f"{label}-{mode}-seed{seed}")


def train_one(data_folder: Path, label: str, mode: str | None = None, seed: int = 0) -> None:
    """In a process of its own, once."""
    folder = folder_of(label, mode, seed)
    words = [f"--data_folder={data_folder}", f"--label={label}", f"--output_folder={folder}"]
    words += [] if mode is None else [f"--guidance={mode}", f"--seed={seed}"]
    train_once(f"hparams/speechocean762/{'teacher' if mode is None else 'student'}.yaml", folder, words)


if __name__ == "__main__":
    main()
