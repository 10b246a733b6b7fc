"""Sentences without labels that are on every machine with Python: the docstrings of its standard library."""

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from cald_speech.errors import UserError

NO_TEXT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "pydoc_data", "encodings"}
FEWEST_WORDS, MOST_WORDS = 4, 60
SPLITS = ("train", "valid", "test")


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def docstrings(path: Path) -> Iterator[str]:
    """Those of a source file's module, classes and functions; none of a file that is no Python of this version."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)


def sentences_of(text: str) -> list[str]:
    """The sentences of a docstring's paragraphs of prose, in their order.

    Example
    -------
    >>> sentences_of("Return the number of items. It is never negative, and may be 0.\\n\\n    >>> f()\\n    3")
    ['Return the number of items.', 'It is never negative, and may be 0.']
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        if re.search(r"^(\s{2,}|>>>|[-*=+|])", paragraph, re.MULTILINE):  # code, lists and tables
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"])", " ".join(paragraph.split())):
            if FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS:
                found.append(sentence)
    return found


def by_split(folder: Path, held_out_share: float) -> dict[str, list[list[str]]]:
    """The docstrings' sentences of train, valid and test, by a hash of the file's name; no sentence twice.

    Raises: UserError, where there is no folder, or a split gets none.
    """
    if not folder.is_dir():
        raise UserError(f"expected Python sources in {folder}, but there is no such folder. Correct --data_folder")
    sets: dict[str, list[list[str]]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    files = [path for path in folder.rglob("*.py") if not NO_TEXT & set(path.relative_to(folder).parts)]
    for path in sorted(files):
        place = int(hashlib.sha256(str(path.relative_to(folder)).encode()).hexdigest(), 16) % 10_000 / 10_000
        split = "valid" if place < held_out_share else "test" if place < 3 * held_out_share else "train"
        for text in docstrings(path):
            new = [sentence for sentence in dict.fromkeys(sentences_of(text)) if sentence not in seen]
            seen.update(new)
            if new:
                sets[split].append(new)
    if empty := [name for name, found in sets.items() if not found]:
        raise UserError(
            f"{folder}: its {len(files)} Python files give {', '.join(empty)} no sentence: expected docstrings in some "
            "dozens of files. Give another --data_folder, or raise held_out_share"
        )
    return sets
