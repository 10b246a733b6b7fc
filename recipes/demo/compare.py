"""The demo's student with one mixer and another, after few steps and more:

python recipes/demo/compare.py --steps 100 --steps 400

Every run is `make demo`'s guided student, but for its mixer, steps and seed; the schedule ends with the steps. A run
that stands in results/demo/compare is not repeated, and compare.png there has all runs that stand there. The last line
is the rows as JSON.
"""

import json
import time
from itertools import product
from pathlib import Path

import click

from cald_speech.commands import options
from cald_speech.evaluation.report import format_table, read_result
from cald_speech.files import whole_file
from cald_speech.recipes import commit
from cald_speech.recipes.demo.figure import draw_steps
from cald_speech.recipes.demo.run import RESULTS, TEACHER, recipe
from cald_speech.recipes.demo.synthesis import synthesise_corpus
from cald_speech.recipes.grid import MIXERS, schedule
from cald_speech.tasks.wer import compare

FOLDER = RESULTS / "compare"


@options.command()
@click.option("--steps", type=int, multiple=True, default=(100, 400), show_default=True, help="May be repeated.")
@click.option("--seed", type=int, multiple=True, default=(0,), show_default=True, help="May be repeated.")
@click.option("--mixer", type=click.Choice(list(MIXERS)), multiple=True, help="May be repeated; default: all.")
@click.option("--calibrate", type=int, default=0, show_default=True, help="Utterances to calibrate the start on.")
def main(steps: tuple[int, ...], seed: tuple[int, ...], mixer: tuple[str, ...], calibrate: int) -> None:
    """Train and test a student for each number of steps, seed and mixer."""
    synthesise_corpus(RESULTS / "data")
    for count, one, name in product(steps, seed, mixer or MIXERS):
        run(name, count, one, calibrate)
    evaluate(TEACHER, FOLDER / "teacher")
    rows = [row(folder_of(*asked, calibrate)) for asked in product(mixer or MIXERS, steps, seed)]
    tested = [row(facts.parent.parent) for facts in sorted(FOLDER.glob("*/report/row.json"))]
    uncalibrated = [one for one in tested if not one["calibrated on"]]
    if uncalibrated:
        draw_steps(uncalibrated, read_result(FOLDER / "teacher", "test").words.rate, FOLDER / "compare.png")
    click.echo(format_table(rows))
    click.echo(json.dumps(rows))


def folder_of(mixer: str, steps: int, seed: int, calibrate: int) -> Path:
    """Where a student lives."""
    return FOLDER / f"{mixer}-{steps}-{seed}{f'-calibrated-{calibrate}' if calibrate else ''}"


def run(mixer: str, steps: int, seed: int, calibrate: int) -> None:
    """Train and test one student, once."""
    folder = folder_of(mixer, steps, seed, calibrate)
    if (folder / "report/row.json").exists():
        return
    start = time.perf_counter()
    words = (*arguments(mixer, steps, seed, calibrate), "--output_folder", folder)
    recipe("train.py", "hparams/demo/students.yaml", *words)
    evaluate(folder / "model", folder / "report")
    facts = {"mixer": mixer, "calibrated on": calibrate, "steps": steps, "seed": seed}
    facts |= {"minutes": round((time.perf_counter() - start) / 60, 1), "commit": commit()}
    with whole_file(folder / "report/row.json") as unfinished:
        unfinished.write_text(json.dumps(facts))


def evaluate(model: Path, report: Path) -> None:
    """Test a model, once."""
    if not (report / "test.json").is_file():  # the folder may be there without, where a run was killed
        recipe("evaluate.py", model, "--data_folder", RESULTS / "data", "--split", "test", "--output_folder", report)


def row(folder: Path) -> dict[str, object]:
    """What is known of a student that was tested; differences are paired over the utterances."""
    result, teacher = (read_result(report, "test") for report in (folder / "report", FOLDER / "teacher"))
    facts = json.loads((folder / "report/row.json").read_text())
    minutes, commit = facts.pop("minutes"), facts.pop("commit")
    (low, high), (difference, *interval) = result.interval(), compare(result, teacher)
    facts |= {"WER %": result.words.rate, "low": low, "high": high, "minus teacher": difference}
    facts |= dict(zip(("diff low", "diff high"), interval, strict=True))
    return facts | {"minutes": minutes, "commit": commit}


def arguments(mixer: str, steps: int, seed: int, calibrate: int) -> list[str]:
    """Words for train.py: what is not as hparams/demo/students.yaml has it."""
    layer_map = f"{{default: !name:cald_speech.mixers.{MIXERS[mixer]}}}"
    return [
        *("--guidance", "target", "--num_steps", str(steps), "--seed", str(seed)),
        *("--calibrate", str(calibrate)),
        *("--schedule", schedule(steps)),
        *("--layer_map", f"!new:cald_speech.conversion.LayerMap {layer_map}"),
    ]


if __name__ == "__main__":
    main()
