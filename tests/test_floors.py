"""The floors of the house: a file imports only from lower floors or its own folder, and third party by its floor.

What a floor may use, the floors above may use. No file imports, by way of others, itself. Inside a function stand only
imports of packages that not everybody has, or that take seconds and are seldom needed.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cald_speech

ROOT = Path(cald_speech.__file__).parent
FLOORS = {
    "ops": 0,
    "errors": 0,
    "files": 0,
    "audio_files": 1,
    "mixers": 1,
    "output": 1,
    "families": 2,
    "conversion": 3,
    "distillation": 4,
    "longform": 4,
    "data": 4,
    "shipped": 4,
    "experiment_yaml": 4,
    "tasks": 5,
    "evaluation": 6,
    "benchmarks": 6,
    "training": 7,
    "serving": 7,
    "commands": 8,
    "recipes": 8,
}
ANYWHERE = {"numpy", "torch"}
THIRD_PARTY = {
    "audio_files": {"soundfile", "av"},  # av is of the extra `formats`
    "families": {"transformers", "huggingface_hub", "safetensors"},
    "conversion": {"onnx", "onnxruntime", "onnxscript"},
    "longform": {"soundfile", "tqdm"},  # tqdm comes with huggingface_hub
    "data": {"speechbrain", "soundfile", "torchaudio", "tqdm", "tokenizers", "datasets", "pyarrow", "lhotse"},
    "tasks": {"jiwer"},
    "experiment_yaml": {"hyperpyyaml", "ruamel"},
    "training": {"tensorboard", "wandb", "mlflow", "peft"},
    "evaluation": {"matplotlib", "lm_eval"},
    "benchmarks": {"matplotlib", "fla", "causal_conv1d"},
    "serving": {"fastapi", "starlette", "uvicorn", "python_multipart"},
    "commands": {"click"},
}
INSIDE_A_FUNCTION = {
    "conversion": {"onnx", "onnxruntime", "onnxscript"},  # of the extra `onnx`
    "training": {"wandb", "mlflow", "peft"},  # where a logger of theirs, or adapters, are chosen
    "tasks": {"speechbrain"},  # its beam search takes seconds to import, and greedy decoding does without it
    "data": {"datasets", "pyarrow", "lhotse"},  # of the extras `data` and `lhotse`
    "evaluation": {"lm_eval"},  # of the extra `text`
    "benchmarks": {"fla", "causal_conv1d"},  # peers, where they are installed
    "serving": {"fastapi", "starlette", "uvicorn", "python_multipart"},  # of the extra `serve`
}
BACKEND_FOLDERS = {"triton"}  # a backend's package: only in the folders of ops/ that are named after it
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imported_modules(path: Path, *, inside: bool = False) -> set[str]:
    """Every module named by an import statement; with ``inside`` those alone that stand inside a function.

    What type checkers alone import counts too.
    """
    tree, modules = ast.parse(path.read_text()), set()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in (node for root in (functions if inside else [tree]) for node in ast.walk(root)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= names if node.module == "cald_speech" else {node.module}
    return modules


def files_imported(file: str) -> set[str]:
    """The files of the package that a file imports, ``from package import module`` included."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        names = [alias.name for alias in getattr(node, "names", [])]
        if isinstance(node, ast.Import):
            modules = names
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{name}" for name in names]
            modules = [m if file_of(m) else node.module for m in modules]
        else:
            continue
        found |= {file_of(module) for module in modules} - {None}
    return found


def file_of(module: str) -> str | None:
    """The file of a module of the package; None for what is none."""
    path = Path(*module.split(".")[1:])
    places = (path.with_suffix(".py"), path / "__init__.py") if path.name else (path / "__init__.py",)
    inside = module.split(".")[0] == "cald_speech"
    return next((place.as_posix() for place in places if inside and (ROOT / place).is_file()), None)


def place_of(file: str) -> str:
    return file.replace(".", "/").split("/")[0]


def allowed_third_party(file: str) -> set[str]:
    place = place_of(file)
    below = {p for p in THIRD_PARTY if FLOORS[p] < FLOORS[place]} | {place}
    backend = BACKEND_FOLDERS & {*Path(file).parent.parts} if place == "ops" else set()
    return ANYWHERE | backend | set().union(*(THIRD_PARTY.get(p, set()) for p in below))


def faults_of(file: str) -> list[str]:
    place, faults = place_of(file), []
    for module in imported_modules(ROOT / file):
        top, _, rest = module.partition(".")
        other = rest.split(".")[0]
        if top != "cald_speech":
            if top not in sys.stdlib_module_names | allowed_third_party(file):
                faults.append(f"{module} is not for floor F{FLOORS[place]} ({place})")
        elif other not in FLOORS:
            # A public name stands where the package takes it from; the package itself, above the highest of them.
            home = place_of(cald_speech.PUBLIC.get(other, "").removeprefix("cald_speech.")) or "longform"
            if FLOORS[home] >= FLOORS[place] or (rest and other not in (*cald_speech.PUBLIC, "__version__")):
                faults.append(f"{module} is on no floor")
        elif not (FLOORS[other] < FLOORS[place] or other == place):
            faults.append(f"{module} is on floor F{FLOORS[other]}, not below F{FLOORS[place]} ({place})")
    allowed = INSIDE_A_FUNCTION.get(place, set())
    for module in imported_modules(ROOT / file, inside=True):
        if module.split(".")[0] not in allowed:
            faults.append(f"{module} is imported inside a function")
    return sorted(faults)


def circle(files: list[str]) -> list[str]:
    """Files that import each other in a ring, first to last; none where there is no ring."""
    try:
        # The package's own __init__ imports for type checkers alone what it hands out when asked.
        TopologicalSorter({f: files_imported(f) for f in files if f != "__init__.py"}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("file", [f for f in FILES if f != "__init__.py"])
def test_imports_come_from_below(file):
    assert place_of(file) in FLOORS, f"{file} stands on no floor"
    assert faults_of(file) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("ops/x.py", "from cald_speech.mixers import Mamba2", "cald_speech.mixers is on floor F1"),
        ("ops/x.py", "import triton", "triton is not for floor F0"),
        ("ops/x.py", "def f():\n    from cald_speech.ops import ssd", "cald_speech.ops is imported inside a function"),
        ("evaluation/x.py", "def f():\n    import matplotlib", "matplotlib is imported inside a function"),
        ("mixers/x.py", "from transformers import AutoModel", "transformers is not for floor F1"),
        ("mixers/x.py", "import cald_speech", "cald_speech is on no floor"),
        ("distillation/x.py", "import cald_speech.data.audio", "cald_speech.data.audio is on floor F4"),
        ("distillation/x.py", "import speechbrain", "speechbrain is not for floor F4"),
        ("tasks/x.py", "from cald_speech import training", "cald_speech.training is on floor F7"),
    ],
)
def test_a_wrong_import_is_found(file, line, fault, tmp_path, monkeypatch):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [found[: len(fault)] for found in faults_of(file)] == [fault]


def test_no_files_import_each_other():
    assert circle(FILES) == []


def test_a_circle_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/__init__.py").write_text("from cald_speech.data.a import A")
    (tmp_path / "data/a.py").write_text("from cald_speech.data import b")
    (tmp_path / "data/b.py").write_text("def f():\n    import cald_speech.data.a")
    assert set(circle(["data/__init__.py", "data/a.py", "data/b.py"])) == {"data/a.py", "data/b.py"}


def test_triton_is_allowed_in_its_backend_alone():
    assert "triton" in allowed_third_party("ops/ssd/triton/states.py")
    assert "triton" not in allowed_third_party("ops/ssd/naive.py") | allowed_third_party("mixers/triton/x.py")


@pytest.mark.slow
def test_the_lower_floors_need_no_optional_package():
    """F0 to F3, distillation and longform import with only torch, transformers, safetensors and soundfile."""
    places = [place for place, floor in FLOORS.items() if floor <= 3] + ["distillation", "longform"]
    files = [f for f in FILES if place_of(f) in places and "triton" not in Path(f).parent.parts]
    modules = [f.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for f in files]
    blocked = ("speechbrain", "torchaudio", "triton", "mamba_ssm", "jiwer", "hyperpyyaml", "matplotlib", "click")
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"[importlib.import_module('cald_speech.' + name) for name in {modules!r}]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
