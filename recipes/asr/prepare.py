"""Data of your own, in any format that `cald_speech.data.readers` knows, to manifests."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cald_speech.data.readers import prepare_corpus
from cald_speech.errors import UserError
from cald_speech.files import from_home

Sources = str | Sequence[str] | None
SETS = re.compile(r"[\w][\w.-]*")


def prepare(
    data_folder: Path,
    output_folder: Path,
    *,
    train: Sources = None,
    valid: Sources = None,
    test: Sources | Mapping[str, Sources] = None,
    columns: Mapping[str, Any] | None = None,
    drop_bad_audio: bool = False,
) -> dict[str, Path]:
    """Write output_folder/manifests/{train,valid,test}.json and return {name: path}.

    Each set is a file, a folder, an address on the hub, or a list of them; paths are relative to `data_folder`. Several
    test sets are a mapping of their names. `columns` says which column holds what, where the names alone do not.

    Raises: UserError, with file and line, for what is missing, malformed, or cannot be read.
    """
    sets = {"train": train, "valid": valid}
    tests = test if isinstance(test, Mapping) else {"test": test}
    for name in tests:
        if name in sets or not isinstance(name, str) or not SETS.fullmatch(name):
            raise UserError(f"test: expected names of sets, such as {{clean: a.csv, noisy: b.csv}}, got {name!r}")
    sets |= tests
    for name in ("train", "valid"):
        if not sets[name]:
            raise UserError(f"{name}: expected a corpus (a table, a folder, ...), got none. Give --{name} PATH")
    manifests = {}
    for name, given in sets.items():
        sources = [given] if isinstance(given, str) else given or []
        if not isinstance(sources, Sequence) or not all(isinstance(source, str) for source in sources):
            raise UserError(f"{name}: expected a path or a list of paths, got {given!r}")
        if sources:
            places = [
                source if source.startswith("hf:") else str(Path(data_folder, from_home(source))) for source in sources
            ]
            manifests[name] = Path(output_folder) / "manifests" / f"{name}.json"
            prepare_corpus(manifests[name], *places, columns=columns, drop_bad_audio=drop_bad_audio)
    return manifests
