"""Every link, path, dotted name, command and option that a page names is there."""

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import click
import pytest

from cald_speech.commands import main
from cald_speech.distillation import LossForm
from cald_speech.distillation.guidance import every_option
from cald_speech.shipped import experiment_file
from cald_speech.training.command_line import RUN_OPTIONS
from cald_speech.training.settings import Settings
from tests.docs.pages import NAMES, PAGES, ROOT, blocks, command_lines, prose, spans

PACKAGE = ROOT / "cald_speech"
MADE_BY_COMMANDS = ("results", "data", "recordings", "site")  # folders that a reader makes
SUFFIXES = ["py", "md", "yaml", "yml", "sh", "c", "h", "json", "csv", "cff", "toml", "txt"]
pages = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@cache
def text_of(page: Path) -> str:
    return page.read_text()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.+)$", prose(text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pages
def test_links(page):
    text = prose(text_of(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if place.suffix == ".md" and anchor:
            assert anchor in anchors(place), target


def named_paths(page: Path) -> Iterator[str]:
    """What looks like a path of the repository, in prose and in commands."""
    words = spans(text_of(page)) + [word for line in command_lines(text_of(page)) for word in line.split()]
    for word in words:
        word = word.rstrip(",;:")
        top = word.split("/")[0]
        ours = "/" in word and top not in MADE_BY_COMMANDS
        if word.endswith("/"):  # or a folder of a corpus
            ours = ours and any((place / top).exists() for place in (ROOT, PACKAGE))
        known_end = re.fullmatch(rf"[\w./*\-]+\.({'|'.join(SUFFIXES)})|[\w./\-]+/", word)
        if ours and known_end and not word.startswith(("/", "./", "~", "http")):
            yield word


@pages
def test_paths(page):
    for path in set(named_paths(page)):
        places = (ROOT, PACKAGE, page.parent)
        assert any(list(place.glob(path)) for place in places), path


# What a run and a command write into their folders.
WRITTEN = ("settings.yaml", "keep_best.yaml")


@pages
def test_experiments(page):
    made_here = {title for _, title, _ in blocks(text_of(page)) if title}
    there = {path.name for path in (ROOT / "hparams").rglob("*.yaml")} | {"mkdocs.yml"}
    for name in re.findall(r"`[^`\n]*?([\w\-]+\.ya?ml)\b[^`\n]*`", prose(text_of(page))):
        assert name in there | made_here | {"x.yaml", *WRITTEN}, name


@pages
def test_guidance_modes(page):
    for name in re.findall(r"--guidance[ =]([a-z_]+)", text_of(page)):
        assert (ROOT / "hparams/guidance" / f"{name}.yaml").is_file(), name


@pages
def test_dotted_names(page):
    for dotted in set(re.findall(r"\bcald_speech(?:\.\w+)+", text_of(page))):
        assert resolved(dotted) or dotted.endswith(".MyMixer"), dotted  # which the reader is to write


def resolved(dotted: str) -> bool:
    """Whether it is a module, or something in one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pages
def test_python_imports_what_is_there(page):
    for language, _, body in blocks(text_of(page)):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("cald_speech"):
                for alias in node.names:
                    assert resolved(f"{node.module}.{alias.name}"), alias.name


def calls(lines: list[str], program: str) -> list[list[str]]:
    """The words after ``program``, up to the end of that command, in each of the lines."""
    found = (re.finditer(rf"(?:^|[\s;|&]){re.escape(program)} ([^;|#]*)", line) for line in lines)
    return [match[1].split() for matches in found for match in matches if match[1].strip()]


def options_in(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match(r"--\w", word)}


@cache
def options_of_help(*command: str) -> set[str]:
    """What the command's own help names."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        main([*command, "--help"], prog_name="cald-speech")
    return set(re.findall(r"--[\w-]+", told.getvalue()))


def train_keys(experiment: str) -> set[str]:
    """What `train` takes: every setting, and the keys of this yaml."""
    keys = {f.name for f in fields(Settings)} | set(every_option()) | set(LossForm.options()) | set(RUN_OPTIONS)
    if re.fullmatch(r"[\w/\-]+\.yaml", experiment) and experiment.startswith("hparams/"):
        keys |= set(re.findall(r"^(\w+):", experiment_file(ROOT / experiment).read_text(), re.MULTILINE))
    return {f"--{key}" for key in keys}


@pages
def test_commands_in_a_sentence(page):
    """Those in fenced blocks are parsed by tests/recipes/test_readme.py; those of the tutorial are run."""
    for name, *words in calls(spans(text_of(page)), "cald-speech"):
        if name in ("COMMAND", "--help", "--version"):
            continue
        command = main.get_command(None, name)
        assert command is not None, name
        if name == "train":
            known = (train_keys(words[0]) if words else set()) | {"--help"}
        elif isinstance(command, click.Group):
            assert not words or words[0] in command.list_commands(None), words
            known = options_of_help(name, words[0]) if words else set()
        else:
            known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert options_in(words) <= known, (name, options_in(words) - known)


@pages
def test_modules_that_are_run(page):
    for flag, *words in calls(command_lines(text_of(page)), "python"):
        if flag == "-m" and words[0].startswith("cald_speech"):
            import_module(words[0])


@pages
def test_make_targets(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in calls(command_lines(text_of(page)), "make"):
        assert words[0] in targets, words


def test_pages_that_code_names():
    """Comments and docstrings send their reader to pages that are there."""
    for folder in ("cald_speech", "recipes", "hparams", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".sh", ".c", ".h"):
                for page in re.findall(r"\b(?:docs|dev)/[\w/]+\.\w+", path.read_text()):
                    assert (ROOT / page).is_file(), (path, page)


def test_the_public_surface_is_on_its_page():
    import cald_speech

    text = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    for name in cald_speech.__all__:
        assert re.search(rf"^::: cald_speech\.(\w+\.)*{name}$", text, re.MULTILINE), name


def test_every_command_is_on_a_page():
    text = "".join(map(text_of, PAGES))
    for name in main.list_commands(None):
        assert f"cald-speech {name}" in text, name


def test_a_page_that_names_what_is_not_there_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "[a](gone.md) `recipes/gone.py` `cald_speech.gone` `gone.yaml` `cald-speech evaluate M T --gone 1` `make gone`"
    )
    for check in (
        test_links,
        test_paths,
        test_dotted_names,
        test_experiments,
        test_commands_in_a_sentence,
        test_make_targets,
    ):
        with pytest.raises(AssertionError):
            check(page)
