"""One student of all-MiniLM-L6-v2 for each mixer: what it keeps of the teacher's similarities, and time by length.

    python recipes/minilm/compare.py hparams/minilm/student.yaml

Stopped and started again, it goes on where it was. Prints the table, and one JSON line last.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from cald_speech.commands.options import command
from cald_speech.data.tables import read_table
from cald_speech.errors import UserError
from cald_speech.evaluation.forward import chosen
from cald_speech.evaluation.report import format_table
from cald_speech.files import whole_file
from cald_speech.mixers import Bidirectional, Linformer, Mamba2, NormalisedLinearAttention
from cald_speech.recipes import stamped, train_apart
from cald_speech.recipes.minilm.prepare import prepare
from cald_speech.recipes.minilm.similarity import figures, seconds_by_length
from cald_speech.training.settings import Settings

_BOTH = "Bidirectional {{share_projections: True, mixer: !name:cald_speech.mixers.{} {{}}}}"
# As a yaml names them, and as a function makes them at another length.
MIXERS = {
    "normalised": _BOTH.format("NormalisedLinearAttention"),
    "mamba2": _BOTH.format("Mamba2"),
    "linformer": "Linformer {k: 32, max_length: 128}",
}
LENGTHS = (128, 512, 2048, 8192)


def timed_mixer(name: str, longest: int) -> Any:
    """The mixer with weights for so many tokens; Linformer's mixtures are then k = 256, as in its paper."""
    both = partial(Bidirectional, share_projections=True)
    return {
        "teacher": None,
        "normalised": partial(both, mixer=NormalisedLinearAttention),
        "mamba2": partial(both, mixer=Mamba2),
        "linformer": partial(Linformer, k=256, max_length=longest),
    }[name]


@command()
@click.argument("experiment", type=Path)
@click.option("--mixers", default=",".join(MIXERS), show_default=True)
@click.option("--num_steps", type=int, help="Of each student. Default: the experiment's.")
@click.option("--sentences", default=500, show_default=True, help="Of the test set, all of whose pairs are compared.")
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True, help="Tokens, for the times.")
@click.option("--results", type=Path, help="Default: beside the experiment's output_folder.")
def main(experiment: Path, mixers: str, num_steps: int | None, sentences: int, lengths: str, results: Path | None):
    """Train the students of EXPERIMENT and compare them with its teacher."""
    names = mixers.split(",")
    if unknown := [name for name in names if name not in MIXERS]:
        raise UserError(f"--mixers: expected some of {', '.join(MIXERS)}, got {', '.join(unknown)}")
    given = {} if num_steps is None else {"num_steps": num_steps}
    settings = Settings.load(experiment, given)
    results = results or Path(settings.output_folder).parent
    tables = prepare(Path(settings.data_folder), Path(settings.prepare_folder or results / "data"), **settings.corpus)
    rows = list(read_table(tables["test"]).values())
    texts = [rows[place]["text"] for place in chosen(len(rows), sentences)]
    pairs = json.loads(tables["test"].with_name("pairs.json").read_text())
    tokens = [int(length) for length in lengths.split(",")]
    found = []
    for name in ("teacher", *names):
        folder, facts = results / name, {}
        if name == "teacher":
            model = settings.teacher
        else:
            words = [f"--output_folder={folder}", *(f"--{key}={value}" for key, value in given.items())]
            factory = f"!name:cald_speech.mixers.{MIXERS[name]}"
            words.append(f"--layer_map=!new:cald_speech.conversion.LayerMap {{default: {factory}}}")
            facts = {"steps": settings.num_steps, "commit": stamped(folder)}
            train_apart(experiment, folder, words)
            model = str(folder / "model")
        of = recorded(folder / "similarity.json", lambda m=model: figures(m, settings.teacher, texts, pairs))
        times = recorded(
            folder / "seconds.json",
            lambda n=name: seconds_by_length(settings.teacher, timed_mixer(n, max(tokens)), tokens),
        )
        found.append({"model": name, **of, **{f"s at {length}": s for length, s in times.items()}, **facts})
        print(format_table(found), flush=True)
    print(json.dumps({"rows": found, "sentences": len(texts), "pairs": len(pairs)}))


def recorded(path: Path, measure: Any) -> dict[str, float]:
    """What was measured before, or now."""
    if not path.is_file():
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(measure()) + "\n")
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
