"""The grid of guidance modes, starts and mixers on real digits, three seeds each, at equal steps (cells.py).

    python recipes/digits/compare.py --jobs 2

Stopped and started again, it goes on where it was (recipes/grid.py). Results and figures go to results/digits/grid; the
last line is one JSON list.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from cald_speech.commands.options import command
from cald_speech.recipes.digits.cells import make_cells
from cald_speech.recipes.digits.clip_bootstrap import errors_of_words
from cald_speech.recipes.digits.prepare import prepare, test_strings
from cald_speech.recipes.grid import Grid, grid_options, with_stages
from cald_speech.recipes.grid_table import Counts, summarise
from cald_speech.tasks.wer import EvaluationResult


@command()
@grid_options("data/fsdd", "results/digits/grid", 200, ", the stages before it counted in")
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
    numbers = [int(seed) for seed in seeds.split(",")]
    prepare(data_folder, Path("results/digits/data"))  # not twice at once, by the first trainings
    prepare(data_folder, Path("results/digits/data_hundredth"), num_train=80)
    if any("transcripts_of" in cell.keys.get("corpus", "") for cell in cells.values()):
        prepare(data_folder, Path("results/digits/data"), transcripts_of="results/digits/teacher/model")
    grid = Grid("hparams/digits/grid.yaml", cells, numbers, data_folder, output_folder, repeat or None)
    grid.train_all(jobs)
    test = prepare(data_folder, Path("results/digits/data"))["test"]
    teachers = {"teacher": Path("results/digits/teacher")}
    students = list(grid.evaluated(test))
    print(json.dumps(summarise(students, output_folder, teachers, test, counts_of=errors_by_clip)))


def errors_by_clip(result: EvaluationResult) -> Counts:
    """Every word of the test strings is a clip, and strings share clips: clips are drawn."""
    errors = [error for utterance in result.utterances for error in errors_of_words(utterance)]
    clips = [clip for utterance in result.utterances for clip in test_strings()[utterance.id].clips]
    return errors, [1] * len(errors), clips


if __name__ == "__main__":
    main()
