"""An experiment's yaml: read with hyperpyyaml, laid over the yaml it is based on, with the command line on top."""

import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML, YAMLError

from cald_speech.distillation import Guidance
from cald_speech.errors import UserError


def load_experiment(path: Path, overrides: Mapping[str, Any] | str) -> tuple[dict[str, Any], set[str]]:
    """The values of an experiment, and the keys that other keys refer to, even if an override took their place."""
    try:
        text = _with_base(path, overrides)
        return load_hyperpyyaml(text), set(re.findall(r"<(\w+)", text + _with_base(path, "")))
    except (YAMLError, ValueError, TypeError, ImportError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error


def _with_base(path: Path, overrides: Mapping[str, Any] | str) -> str:
    """The text of an experiment laid over the experiment it names as its ``base``, with ``overrides`` on top."""
    if not path.is_file():
        raise UserError(f"no experiment file {path}: expected a yaml, such as hparams/mamba.yaml")
    yaml = YAML()
    tree = yaml.load(path.read_text())
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, got {type(tree).__name__}")
    _lay_over(tree, (yaml.load(overrides) or {}) if isinstance(overrides, str) else overrides)
    base = tree.pop("base", None)
    if base is not None:
        below = yaml.load(_with_base(path.parent / base, ""))
        _lay_over(below, tree)
        tree = below
    text = StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Put the values of ``above`` over those of ``below``, in place, key by key.

    A mapping with a tag of its own (``!new:``) is another object, and takes the place of what was there.
    """
    for key, value in above.items():
        tag = getattr(value, "tag", None)
        is_new = tag is not None and tag.value is not None
        if isinstance(value, Mapping) and isinstance(below.get(key), Mapping) and not is_new:
            _lay_over(below[key], value)
        else:
            below[key] = value


def load_guidance(folder: Path, name: str, given: Mapping[str, Any]) -> Guidance:
    """The mode in ``folder/guidance/name.yaml``, with what it knows of the keys that are ``given`` (None: not)."""
    path = folder / "guidance" / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"guidance: expected one of {names} (the files in {path.parent}), got {name!r}")
    text = path.read_text()
    # A mode takes from the experiment what it knows: `unguided` has no weights, only `hybrid` has a switch.
    used = {key: value for key, value in given.items() if value is not None and f"\n{key}:" in f"\n{text}"}
    try:
        return load_hyperpyyaml(text, used)["guidance"]
    except ValueError as error:
        raise UserError(f"{path}: {error}. Set the missing key in the experiment's yaml") from error
