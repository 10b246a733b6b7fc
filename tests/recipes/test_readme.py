"""Every command of recipes/README.md and README.md can be started: what it names is there, and its yaml takes it."""

import itertools
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from cald_speech.training.run import parse
from cald_speech.training.settings import Settings
from tests.training.miniature import ROOT

PAGES = ("recipes/README.md", "README.md")
PLACES = {
    "MODE": ("unguided", "target", "trajectory", "waypoint", "hybrid"),
    "TASK": ("qnli", "qqp", "sst2", "imdb"),
    "STEPS": ("5719", "11439", "22878"),
    "LIB": ("lib/python3",),
}


def commands(page: str) -> list[str]:
    """The command lines of a page that run a recipe, as they stand."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python recipes/")]


def filled_in(line: str) -> list[str]:
    """The command for every value of the words in capitals."""
    words = [name for name in PLACES if re.search(rf"\b{name}\b", line)]
    lines = [line]
    for name in words:
        lines = [re.sub(rf"\b{name}\b", value, one) for one, value in itertools.product(lines, PLACES[name])]
    return lines


LINES = [line for page in PAGES for line in commands(page)]
TRAINING = sorted({line for line in LINES if "/train.py " in line})
CELLS = [one for line in TRAINING for one in filled_in(line)]
CHOICES = re.compile(r" --guidance \w+")
TEACHERS = [cell for cell in CELLS if CHOICES.search(cell) is None or " --teacher null" in cell]


@cache
def load(command: str, waypoints: Path | None = None) -> Settings:
    """The settings of a training command; with another folder in the place of its waypoints, if one is given."""
    argv = shlex.split(command)[2:]
    if waypoints is not None:
        if "--waypoints" in argv:
            at = argv.index("--waypoints")
            del argv[at : at + 2]
        argv.append(f"--waypoints={waypoints}")
    return parse([str(ROOT / argv[0]), *argv[1:]])[0]


def waypoints_for(command: str, folder: Path) -> Path:
    """A folder that looks like the waypoints of the teacher that the page trains for this student."""
    named = load(CHOICES.sub(" --guidance target", command)).options["waypoints"]
    found = [load(one) for one in TEACHERS]
    keepers = [s for s in found if f"{s.output_folder}/waypoints" == named and s.waypoint_every_steps]
    assert keepers, f"no command of the page leaves the waypoints {named} of: {command}"
    for step in range(keepers[0].waypoint_every_steps, keepers[0].num_steps + 1, keepers[0].waypoint_every_steps):
        (folder / f"step-{step:07d}").mkdir()
    return folder


@pytest.mark.parametrize("command", CELLS, ids=[c.removeprefix("python recipes/").replace("/", "-") for c in CELLS])
def test_a_training_command_can_be_started(command, tmp_path):
    settings = load(command, waypoints_for(command, tmp_path) if " --guidance waypoint" in command else None)
    guidance = settings.guidance
    assert (ROOT / shlex.split(command)[1]).is_file()
    if (asked := CHOICES.search(command)) is not None:
        assert type(guidance).__name__.lower() == asked[0].split()[-1]
    # What build_models() would refuse, and a start that is not the mode's.
    if guidance.needs_teacher and not guidance.trains_teacher:
        assert settings.teacher is not None
    if guidance.starts_from == "source":
        assert settings.source is not None
    for model in (settings.teacher, settings.source):
        assert not str(model).startswith("results/") or model in {f"{load(c).output_folder}/model" for c in TEACHERS}


@pytest.mark.parametrize("line", sorted({line for line in LINES if "/train.py " not in line}))
def test_another_command_names_what_its_script_takes(line):
    script, *rest = shlex.split(line)[1:]
    text = (ROOT / script).read_text()
    for word in rest:
        assert not word.startswith("--") or f'"{word}"' in text, word
        assert not word.endswith(".yaml") or (ROOT / word).is_file()


def test_evaluated_folders_are_those_that_training_writes():
    written = {f"{load(one).output_folder}/model" for one in CELLS if " --guidance waypoint" not in one}
    read = {one.split()[2] for line in LINES if "/evaluate.py " in line for one in filled_in(line)}
    assert read and {folder for folder in read if "waypoint" not in folder} <= written


def test_every_cell_of_the_paper_is_there():
    students = (
        "tedlium/student",
        "slurp/student",
        "voxceleb/student",
        *(f"glue/student.yaml --glue_task {task}" for task in PLACES["TASK"]),
    )
    students += tuple(f"pile/student.yaml --data_folder data/pile --num_steps {steps}" for steps in PLACES["STEPS"])
    for name, mode in itertools.product(students, PLACES["MODE"]):
        assert any(f"hparams/{name}" in cell and cell.endswith(f" --guidance {mode}") for cell in CELLS), (name, mode)


def test_every_experiment_is_on_a_page():
    text = "".join((ROOT / page).read_text() for page in PAGES)
    assert all((ROOT / path).exists() for path in re.findall(r"(?<!/)\b(?:recipes|scripts|tests)/[\w/]+\.\w+", text))
    named = {name.removeprefix("hparams/") for name in re.findall(r"([\w/]+\.yaml)", text)}
    there = {path.relative_to(ROOT / "hparams").as_posix() for path in (ROOT / "hparams").rglob("*.yaml")}
    there = {name for name in there if not name.startswith("guidance/")}
    assert named <= there | {f"{mode}.yaml" for mode in PLACES["MODE"]}
    assert there - {"long_audio.yaml"} <= named  # which is a benchmark's
