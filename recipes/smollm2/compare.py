"""SmolLM2 with 2, 4 and 8 of its 30 layers converted, the ones that cost least against random ones; the table.

    python recipes/smollm2/compare.py hparams/smollm2/student.yaml

Stopped and started again, it goes on where it was; --layers 8 --choices importance does a part of it. Prints a table,
and one JSON line last. Every student is an experiment of its own, whose command is in its log.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cald_speech.commands.options import command
from cald_speech.errors import UserError
from cald_speech.evaluation.language import Perplexity, check_generation, perplexity_of
from cald_speech.evaluation.report import format_table
from cald_speech.files import whole_file
from cald_speech.recipes import stamped, train_apart
from cald_speech.recipes.smollm2.importance import chosen_layers, layer_costs
from cald_speech.recipes.smollm2.prepare import prepare
from cald_speech.tasks.bootstrap import paired_bootstrap
from cald_speech.training.settings import Settings

CHOICES = ("importance", "random")


@command()
@click.argument("experiment", type=Path)
@click.option("--layers", default="2,4,8", show_default=True, help="How many are converted, in each student.")
@click.option("--choices", default=",".join(CHOICES), show_default=True)
@click.option("--num_steps", type=int, help="Of each student. Default: the experiment's.")
@click.option("--seed", default=0, show_default=True, help="Of the random choice.")
@click.option("--blocks", default=16, show_default=True, help="Of the validation set, for a layer's cost.")
@click.option("--prompts", default=8, show_default=True, help="That are continued, to check generation.")
@click.option("--results", type=Path, help="Default: beside the experiment's output_folder.")
def main(experiment: Path, layers: str, choices: str, num_steps: int | None, seed: int, **how: Any) -> None:
    """Choose layers of EXPERIMENT's teacher, train the students and compare them with it."""
    given = {} if num_steps is None else {"num_steps": num_steps}
    settings = Settings.load(experiment, given)
    results = how["results"] or Path(settings.output_folder).parent
    sets = prepare(Path(settings.data_folder), Path(settings.prepare_folder or results / "data"), **settings.corpus)
    costs = layer_costs(
        settings.teacher,
        settings.layer_map.default,
        sets,
        results / "importance.json",
        calibrate_blocks=settings.calibrate,
        blocks=how["blocks"],
    )
    wanted = [(choice, int(count)) for count in layers.split(",") for choice in choices.split(",")]
    for choice, count in wanted:
        if choice not in CHOICES or not 1 <= count <= len(costs):
            raise UserError(
                f"--choices, --layers: expected {' and '.join(CHOICES)}, and from 1 to {len(costs)}; got {choice} and "
                f"{count}"
            )
    found = [measured(settings.teacher, sets["test"], results / "teacher.json", how["prompts"]) | {"model": "teacher"}]
    for choice, count in wanted:
        converted = chosen_layers(costs, count, choice, seed)
        folder = results / f"{choice}-{count}"
        kept = {layer: None for layer in range(len(costs)) if layer not in converted}
        words = [f"--output_folder={folder}", f"--layer_map={{overrides: {json.dumps(kept)}}}".replace('"', "")]
        words += [f"--{key}={value}" for key, value in given.items()]
        ran_at = stamped(folder)
        train_apart(experiment, folder, words)
        of = {"model": f"{choice}, {count} layers", "layers": converted, "commit": ran_at}
        of |= {"tokens": settings.num_steps * settings.max_batch_tokens * settings.accumulation}
        found.append(measured(str(folder / "model"), sets["test"], folder / "test.json", how["prompts"]) | of)
        print(format_table(summarise(found)), flush=True)
    print(json.dumps({"costs": costs, "rows": summarise(found), "command": "recipes/smollm2/compare.py"}))


def measured(model: str, tokens: Path, record: Path, prompts: int) -> dict[str, Any]:
    """Loss of each test block, and the check of generation; once for a model."""
    if not record.is_file():
        of, loaded, blocks = perplexity_of(model, tokens)
        generation = check_generation(loaded, blocks, num_prompts=prompts)
        with whole_file(record) as unfinished:
            unfinished.write_text(json.dumps({"of": asdict(of), "generation": generation}) + "\n")
    return json.loads(record.read_text())


def summarise(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for the teacher and one for each student, with its loss over the teacher's, paired over blocks."""
    rows = []
    teacher = Perplexity(**found[0]["of"])
    for one in found:
        of, generation = Perplexity(**one["of"]), one["generation"]
        row = {"model": one["model"], "nats": of.loss, "perplexity": math.exp(of.loss)}
        if one is not found[0]:
            _, low, high = paired_bootstrap(of.nats, teacher.nats, teacher.counts)
            row |= {"over teacher %": 100 * (of.loss / teacher.loss - 1)}
            row |= {"low %": low / teacher.loss, "high %": high / teacher.loss}
            row |= {"tokens": one["tokens"], "layers": " ".join(map(str, one["layers"])), "commit": one["commit"]}
        rows.append(row | {"agreement %": generation["agreement"], "repeated %": generation["repeated"]})
    return rows


if __name__ == "__main__":
    main()
