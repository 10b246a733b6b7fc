"""How the house stands, in numbers: files, circles, arrows upward, near copies, tests, and what a thought passes.

    python scripts/measure_house.py                     this checkout
    python scripts/measure_house.py --root ../other     another one, an older commit say, to compare

Prints a table and, as its last line, the same as JSON. The five walks run the package under a profiler and list the
files of the package whose functions are called, in the order in which they are first entered.
"""

import argparse
import ast
import inspect
import io
import json
import keyword
import os
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from statistics import median

NEAR = 6  # lines that two places share before they count as a near copy
DIFFERENT = 4  # shapes among them; fewer is a list of names or arguments, one a line
COMMON = 8  # places with one and the same run; more is the language's own shape, not a copy
WALKS = (
    "audio batch to its gradient",
    "layer map to converted model",
    "lengths from mixer to op",
    "audio file to text",
)
KEY_WALK = "yaml key to where it acts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout (this one)"
    )
    root = parser.parse_args().root.resolve()
    package = python_files(root, "cald_speech")
    lines = [len((root / file).read_text().splitlines()) for file in package]
    graph = imports(root, package)
    figures = {
        "package_files": len(package),
        "package_lines": sum(lines),
        "median_lines": median(lines),
        "circles": len(circles(graph)),
        "arrows_upward": len(upward(root, graph)),
        "near_copies": sum(1 for _ in near_copies(root, python_files(root, "cald_speech", "recipes", "tests"))),
        "near_copies_in_the_package": sum(1 for _ in near_copies(root, package)),
        "test_lines": sum(len((root / f).read_text().splitlines()) for f in python_files(root, "tests")),
    }
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):28} {value:>7g}")
    passed = walks(root)
    for name, files in passed.items():
        print(f"\n{name}: {len(files)} files\n    " + "\n    ".join(files))
    print(json.dumps(figures | {"walks": {name: len(files) for name, files in passed.items()}}))


def python_files(root: Path, *folders: str) -> list[str]:
    """The Python files that git knows below these folders."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.splitlines() if name.endswith(".py") and (root / name).is_file())


# --- arrows ---------------------------------------------------------------------------------------------------------


def imports(root: Path, files: list[str]) -> dict[str, set[str]]:
    """Which file of the package imports which, wherever in the file the statement stands."""
    by_module = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in files}
    graph = {}
    for file in files:
        named = set()
        for node in ast.walk(ast.parse((root / file).read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {name if name in by_module else node.module for name in inner}
        graph[file] = {by_module[name] for name in named if name in by_module} - {file}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one file."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        reach[start] = seen
    found = {frozenset({file} | {o for o in reach[file] if file in reach[o]}) for file in graph if file in reach[file]}
    return [set(one) for one in found]


def upward(root: Path, graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of a higher floor, or of another room on the same one, by the floors that the checkout's test names."""
    code = "import json; from tests.test_floors import FLOORS; print(json.dumps(FLOORS))"
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    floors = json.loads(done.stdout)

    def place(file: str) -> str:
        return file.split("/")[1].removesuffix(".py")

    arrows = [(file, other) for file, others in graph.items() for other in others]
    inside = [(a, b) for a, b in arrows if place(a) in floors and place(b) in floors and place(a) != place(b)]
    return [(a, b) for a, b in inside if floors[place(b)] >= floors[place(a)]]


# --- near copies ----------------------------------------------------------------------------------------------------


def near_copies(root: Path, files: list[str]) -> Iterator[tuple[str, int, str, int]]:
    """Pairs of places that share ``NEAR`` lines and more of one shape: the same but for names, strings and numbers."""
    shaped = {file: shapes((root / file).read_text()) for file in files}
    places = defaultdict(list)
    for file, rows in shaped.items():
        for start in range(len(rows) - NEAR + 1):
            run = tuple(shape for _, shape in rows[start : start + NEAR])
            if len(set(run)) >= DIFFERENT:
                places[run].append((file, start))
    runs = set()
    for same in places.values():
        if 1 < len(same) <= COMMON:
            runs |= {(a, b, x, y) for (a, x), (b, y) in combinations(same, 2) if a != b or y - x >= NEAR}
    for a, b, x, y in sorted(runs):
        if (a, b, x - 1, y - 1) not in runs:
            yield a, shaped[a][x][0], b, shaped[b][y][0]


def shapes(text: str) -> list[tuple[int, str]]:
    """(line number, shape) of each line of code; no comments, docstrings, imports or lines of punctuation."""
    rows: dict[int, list[str]] = defaultdict(list)
    documented = docstring_lines(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if line in documented or token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT):
            continue
        if token.type == tokenize.NAME:
            rows[line].append(token.string if keyword.iskeyword(token.string) else "name")
        elif token.type in (tokenize.STRING, tokenize.NUMBER):
            rows[line].append("value")
        else:
            rows[line].append(token.string)
    kept = ((line, words) for line, words in sorted(rows.items()) if words[0] not in ("import", "from"))
    return [(line, " ".join(words)) for line, words in kept if {"name", "value"} & set(words)]


def docstring_lines(text: str) -> set[int]:
    lines = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


# --- walks ----------------------------------------------------------------------------------------------------------


def walks(root: Path) -> dict[str, list[str]]:
    """The walks, each in a fresh Python that imports the checkout's own package."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    passed = {}
    for name in (*WALKS, KEY_WALK):
        command = [sys.executable, "-c", f"import runpy; runpy.run_path({__file__!r})['walk']({name!r})"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the walk {name!r} failed:\n{done.stderr}")
        passed[name] = json.loads(done.stdout.splitlines()[-1])
    return passed


def walk(name: str) -> None:
    """Run one walk and print the files of the package that it passed, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        start = {
            WALKS[0]: batch_to_gradient,
            WALKS[1]: layer_map_to_model,
            WALKS[2]: lengths_to_op,
            WALKS[3]: audio_to_text,
            KEY_WALK: key_to_weight,
        }[name]
        print(json.dumps(start(Path(folder))))


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The files of the package whose functions are called meanwhile."""
    import cald_speech

    package = Path(cald_speech.__file__).parent
    passed: list[str] = []

    def look(frame, event, argument) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(f"{package}{os.sep}") and frame.f_code.co_name != "<module>":
            short = str(Path(file).relative_to(package))
            if short not in passed:
                passed.append(short)

    sys.setprofile(look)
    try:
        yield passed
    finally:
        sys.setprofile(None)


def experiment(folder: Path, **keys) -> Path:
    from tests.training import miniature

    teacher = miniature.write_model(folder / "teacher")
    defaults = {
        "output_folder": str(folder / "run"),
        "data_folder": str(miniature.write_corpus(folder / "corpus")),
        "corpus": {"splits": miniature.SPLITS},
        "teacher": str(teacher),
        "guidance": "target",
        "num_steps": 2,
        "max_batch_s": 4.0,
        "log_every_steps": 100,
    }
    return miniature.write_experiment(folder / "hparams" / "experiment.yaml", **(defaults | keys))


def batch_to_gradient(folder: Path) -> list[str]:
    """The second optimiser step of a target-guided run: what is found once is found by then."""
    from cald_speech.training.brain import CaldBrain
    from cald_speech.training.run import run

    try:
        from cald_speech.recipes.librispeech.prepare import prepare
    except ImportError:  # before recipes were modules
        from tests.training.miniature import prepare

    fit_batch, passed = CaldBrain.fit_batch, []

    def watched(brain: CaldBrain, batch: object) -> object:
        if brain.optimizer_step != 1:
            return fit_batch(brain, batch)
        with recorded() as files:
            loss = fit_batch(brain, batch)
        passed.extend(files)
        return loss

    CaldBrain.fit_batch = watched
    run([str(experiment(folder)), "--noprogressbar"], prepare)
    return passed


def layer_map_to_model(folder: Path) -> list[str]:
    from cald_speech import LayerMap, convert
    from cald_speech.families import families, family_of
    from cald_speech.mixers import Mamba2
    from tests.training.miniature import miniature_config

    model = families()["wav2vec2"].load(miniature_config())
    with_family: tuple = (family_of(model),) if "family" in inspect.signature(convert).parameters else ()
    layer_map = LayerMap(Mamba2, {0: None})
    with recorded() as files:
        convert(model, *with_family, layer_map)
    return files


def lengths_to_op(folder: Path) -> list[str]:
    import torch

    from cald_speech.mixers import Mamba2

    mixer, x, lengths = Mamba2(32, 2), torch.randn(2, 20, 32), torch.tensor([20, 13])
    mixer(x, lengths)
    with recorded() as files:
        mixer(x, lengths)
    return files


def audio_to_text(folder: Path) -> list[str]:
    from cald_speech.longform import transcribe
    from tests.training.miniature import write_corpus, write_model

    audio = next(write_corpus(folder / "corpus").rglob("*.flac"))
    model = write_model(folder / "model")
    with recorded() as files:
        list(transcribe(model, audio, force=True))
    return files


def key_to_weight(folder: Path) -> list[str]:
    """alpha_layer, from the experiment's yaml to the weight of a step's loss."""
    from cald_speech.training.run import parse

    path = experiment(folder, alpha_layer=10.0)
    with recorded() as files:
        settings, _ = parse([str(path)])
        assert settings.guidance.weights(0).layer == 10.0
    return files


if __name__ == "__main__":
    main()
