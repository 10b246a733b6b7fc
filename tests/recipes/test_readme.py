"""Every command of the README, the recipes' pages and the docs can be started: its files and its options exist."""

import itertools
import re
import subprocess
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path

import click
import pytest

from cald_speech.commands import main
from cald_speech.training.run import parse
from cald_speech.training.settings import Settings
from tests.training.miniature import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("recipes/**/*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
PAGES.remove(ROOT / "docs/tutorial.md")  # its commands are run, by tests/docs/test_tutorial.py
PLACES = {
    "MODE": ("unguided", "target", "trajectory", "waypoint", "hybrid"),
    "TASK": ("qnli", "qqp", "sst2", "imdb"),
    "STEPS": ("11440", "22880", "45760"),
    "MIXER": ("!name:cald_speech.mixers.Hydra {}",),
}
# The shell expands a page's loops and variables, and prints what it would start, word by word. Nothing else is run.
STARTED = r"""
PATH=
command_not_found_handle() { :; }
started() { printf '%s\037' "$@"; printf '\n'; }
python() { started python "$@"; }
cald-speech() { started cald-speech "$@"; }
"""
Words = tuple[str, ...]


def commands() -> set[Words]:
    """What the pages start: recipes' scripts, and `cald-speech`. MODE and the like stand for each of their values."""
    found: set[Words] = set()
    folder = tempfile.mkdtemp()
    for page in PAGES:
        blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        script = STARTED + "".join(blocks)
        done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
        lines = (tuple(line.split("\037")[:-1]) for line in done.stdout.splitlines())
        found |= {words for words in lines if words[0] == "cald-speech" or words[1].startswith("recipes/")}
    return {filled for words in found for filled in filled_in(words)}


def filled_in(words: Words) -> list[Words]:
    lines = ["\037".join(words)]
    for name, values in PLACES.items():
        if re.search(rf"\b{name}\b", lines[0]):
            lines = [re.sub(rf"\b{name}\b", value, line) for line, value in itertools.product(lines, values)]
    return [tuple(line.split("\037")) for line in lines]


def name_of(words: Words) -> str:
    return " ".join(words[1:]).removeprefix("recipes/").replace("/", "-")


def is_training(words: Words) -> bool:
    return words[:2] == ("cald-speech", "train") or words[1].endswith("/train.py")


def guidance_of(words: Words) -> str | None:
    return words[words.index("--guidance") + 1] if "--guidance" in words else None


ALL = sorted(commands())
CELLS = [words for words in ALL if is_training(words) and words[2] != "x.yaml"]  # that is any
OTHERS = [words for words in ALL if not is_training(words)]
TEACHERS = [
    words for words in CELLS if guidance_of(words) is None or ("--teacher", "null") in itertools.pairwise(words)
]


@cache
def load(words: Words) -> Settings:
    """The settings of a training command."""
    return parse([str(ROOT / words[2]), *words[3:]])[0]


def with_key(words: Words, key: str, value: object) -> Words:
    """The command with another value of a key."""
    at = words.index(key) if key in words else len(words)
    return (*words[:at], *words[at + 2 :], f"{key}={value}")


def waypoints_for(words: Words, folder: Path) -> Path:
    """A folder that looks like the waypoints of the teacher that the page trains for this student."""
    named = load(with_key(words, "--guidance", "target")).options["waypoints"]
    found = [load(one) for one in TEACHERS]
    keepers = [s for s in found if f"{s.output_folder}/waypoints" == named and s.waypoint_every_steps]
    assert keepers, f"no command of the pages leaves the waypoints {named} of: {words}"
    for step in range(keepers[0].waypoint_every_steps, keepers[0].num_steps + 1, keepers[0].waypoint_every_steps):
        (folder / f"step-{step:07d}").mkdir()
    return folder


@pytest.mark.parametrize("words", CELLS, ids=name_of)
def test_a_training_command_can_be_started(words, tmp_path):
    asked = guidance_of(words)
    if asked == "waypoint":
        settings = load(with_key(words, "--waypoints", waypoints_for(words, tmp_path)))
    else:
        settings = load(words)
    guidance = settings.guidance
    assert words[0] == "cald-speech" or words[1] == f"recipes/{settings.recipe}/train.py"
    if asked is not None:
        assert type(guidance).__name__.lower() == asked
    # What build_models() would refuse, and a start that is not the mode's.
    if guidance.needs_teacher and not guidance.trains_teacher:
        assert settings.teacher is not None
    if guidance.starts_from == "source":
        assert settings.source is not None or (asked == "unguided" and settings.teacher is not None)
    # A model of another command: of a training, or of a script that is given the folder to write.
    written = {f"{load(teacher).output_folder}/model" for teacher in TEACHERS}.union(*OTHERS)
    for model in map(str, (settings.teacher, settings.source)):
        assert model in written or not model.startswith("results/")


@cache
def parsed(words: Words) -> dict:
    """The arguments of a command that is no training; click refuses what it does not know."""
    if words[0] == "cald-speech":
        own = main.get_command(click.Context(main), words[1]) if len(words) > 1 and words[1][0] != "-" else main
        rest = list(words[2:])
    else:
        place = Path(words[1])
        own = import_module(f"cald_speech.{'.'.join(place.with_suffix('').parts)}").main
        rest = list(words[2:])
    assert own is not None, words
    if not isinstance(own, click.Command):  # a script without options
        assert not rest
        return {}
    try:
        return own.make_context(words[1], rest).params
    except click.exceptions.Exit:  # --help
        return {}


@pytest.mark.parametrize("words", OTHERS, ids=name_of)
def test_another_command_takes_what_it_is_given(words):
    for name, value in parsed(words).items():
        assert not str(value).endswith(".yaml") or (ROOT / str(value)).is_file(), name


@pytest.mark.slow
def test_evaluated_folders_are_those_that_training_or_a_command_writes():
    written = {f"{load(words).output_folder}/model" for words in CELLS if guidance_of(words) != "waypoint"}
    written |= {words[words.index("--save_to") + 1] for words in OTHERS if "--save_to" in words}
    trained_many = [words for words in OTHERS if words[1].endswith("/mixers.py") and "--output_folder" in words]
    written |= {f"{words[words.index('--output_folder') + 1]}/*/model" for words in trained_many}
    read = set()
    for words in OTHERS:
        if words[1].endswith("/evaluate.py"):
            found = parsed(words)
            read |= {found["folder"]} if "folder" in found else set(found["folders"])
    assert read and {folder for folder in read if "waypoint" not in folder} <= written


def test_every_cell_of_the_paper_is_there():
    students = [("tedlium",), ("slurp",), ("voxceleb",)]
    students += [("glue", "--glue_task", task) for task in PLACES["TASK"]]
    students += [("pile", "--num_steps", steps) for steps in PLACES["STEPS"]]
    for (corpus, *keys), mode in itertools.product(students, PLACES["MODE"]):
        of_corpus = [words for words in CELLS if words[2] == f"hparams/{corpus}/student.yaml"]
        wanted = {*keys, mode}
        assert any(wanted <= set(words) for words in of_corpus), (corpus, keys, mode)


def test_every_recipe_has_a_page_and_every_experiment_is_on_one():
    recipes = {path.parent for path in ROOT.glob("recipes/*/*.py")}
    assert recipes == {page.parent for page in ROOT.glob("recipes/*/README.md")}
    index = (ROOT / "recipes" / "README.md").read_text()
    assert all(f"({recipe.name}/README.md)" in index for recipe in recipes)
    text = "".join(page.read_text() for page in PAGES)
    for path in sorted((ROOT / "hparams").rglob("*.yaml")):
        place = path.relative_to(ROOT / "hparams").as_posix()
        # long_audio.yaml is a benchmark's; the demo's own script names the teacher's two.
        assert place.startswith("guidance/") or place == "long_audio.yaml" or path.name in text, place
