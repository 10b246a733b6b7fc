"""The demo's student with one mixer and another, after few steps and more:

python recipes/demo/compare.py --steps 100 --steps 400

Every run is `make demo`'s guided student, but for its mixer, steps and seed; the schedule ends with the steps. A run
that stands in results/demo/compare is not repeated. The last line is the rows as JSON.
"""

import json
import subprocess
import time

import click

from cald_speech.commands import options
from cald_speech.evaluation.report import format_table, read_result
from cald_speech.recipes.demo.run import RESULTS, ROOT, recipe
from cald_speech.recipes.demo.synthesis import synthesise_corpus
from cald_speech.recipes.grid import MIXERS


@options.command()
@click.option("--steps", type=int, multiple=True, default=(100, 400), show_default=True, help="May be repeated.")
@click.option("--seed", type=int, multiple=True, default=(0,), show_default=True, help="May be repeated.")
@click.option("--mixer", type=click.Choice(list(MIXERS)), multiple=True, help="May be repeated; default: all.")
@click.option("--calibrate", type=int, default=0, show_default=True, help="Utterances to calibrate the start on.")
def main(steps: tuple[int, ...], seed: tuple[int, ...], mixer: tuple[str, ...], calibrate: int) -> None:
    """Train and test a student for each number of steps, seed and mixer."""
    synthesise_corpus(RESULTS / "data")
    rows = [run(name, count, one, calibrate) for count in steps for one in seed for name in mixer or MIXERS]
    click.echo(format_table(rows))
    click.echo(json.dumps(rows))


def run(mixer: str, steps: int, seed: int, calibrate: int) -> dict[str, object]:
    """One row."""
    folder = RESULTS / f"compare/{mixer}-{steps}-{seed}{f'-calibrated-{calibrate}' if calibrate else ''}"
    report = folder / "report"
    if not (report / "row.json").exists():
        start = time.perf_counter()
        words = (*arguments(mixer, steps, seed, calibrate), "--output_folder", folder)
        recipe("train.py", "hparams/demo/students.yaml", *words)
        data = ("--data_folder", RESULTS / "data", "--split", "test", "--output_folder", report)
        recipe("evaluate.py", folder / "model", *data)
        facts = {"minutes": round((time.perf_counter() - start) / 60, 1), "commit": commit()}
        (report / "row.json").write_text(json.dumps(facts))
    result = read_result(report, "test")
    (low, high), facts = result.interval(), json.loads((report / "row.json").read_text())
    row = {"mixer": mixer, "calibrated on": calibrate, "steps": steps, "seed": seed}
    return row | {"WER %": result.words.rate, "low": low, "high": high} | facts


def commit() -> str:
    """Of this checkout, with a mark where files were changed since; empty where there is none."""
    asked = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def arguments(mixer: str, steps: int, seed: int, calibrate: int) -> list[str]:
    """Words for train.py: what is not as hparams/demo/students.yaml has it."""
    schedule = f"{{warmup_steps: 20, decay_steps: {steps - 20}, shape: cosine, floor: 0.02}}"
    layer_map = f"{{default: !name:cald_speech.mixers.{MIXERS[mixer]}}}"
    return [
        *("--guidance", "target", "--num_steps", str(steps), "--seed", str(seed)),
        *("--calibrate", str(calibrate)),
        *("--schedule", f"!new:cald_speech.training.schedules.WarmupSchedule {schedule}"),
        *("--layer_map", f"!new:cald_speech.conversion.LayerMap {layer_map}"),
    ]


if __name__ == "__main__":
    main()
