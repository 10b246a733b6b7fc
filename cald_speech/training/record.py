"""What a run was, in its output folder: ``settings.yaml``, resolved, and ``run.json``, every start of it.

A run goes on under the settings that it had, but for those that change nothing of what is learnt. Under others it goes
on where the command says so, and the record, and the model's card, tell its phases.
"""

import json
import platform
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

from hyperpyyaml import resolve_references
from ruamel.yaml import YAML, YAMLError
from speechbrain.utils.checkpoints import Checkpointer

import cald_speech
from cald_speech.distillation import LossForm, options_of
from cald_speech.errors import UserError, some_of
from cald_speech.files import whole_file
from cald_speech.training.settings import Settings, experiment_text

SETTINGS, STARTS = "settings.yaml", "run.json"
PACKAGES = ("torch", "transformers", "speechbrain", "huggingface_hub", "numpy", "triton")
DATA = "training data"  # stands among the changed keys; its value is the manifest's hash


class RunRecord:
    """The record of one start of a run.

    Arguments
    ---------
    settings : of this start.
    text : the same as yaml, from :func:`resolved_yaml`.
    argv : the words of the command, after the program's name.
    go_on : True lets a run go on under other settings. Where they are what they were it is no fault: a command that
        was cut short is started again as it stands.

    Raises
    ------
    UserError
        where the folder has a checkpoint of a run with other settings, and ``go_on`` is False; where it has none, and
        ``go_on`` is True.
    """

    def __init__(self, settings: Settings, text: str, argv: Sequence[str], *, go_on: bool):
        self.folder, self.text, self.argv, self.go_on = Path(settings.output_folder), text, list(argv), go_on
        self.changed: dict[str, tuple[Any, Any]] = {}
        self.data: str | None = None
        before = self.folder / SETTINGS
        if go_on and not self._can_resume():
            raise UserError(
                f"--go_on: expected the checkpoint of a run in {self.folder}, but there is none to go on from. Leave "
                "--go_on out to start a run there, or give the --output_folder of the run that is to go on"
            )
        if self._can_resume() and before.is_file():  # a run may be older than its record
            try:
                known = YAML().load(before.read_text(encoding="utf-8"))
            except (YAMLError, OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read {before}: {error}. Delete it to go on as the command says") from error
            self.changed = dict(differences(known, YAML().load(text)))
            self._refuse()

    def compare_data(self, fingerprint: str) -> None:
        """The training set's fingerprint belongs to the settings. Raises UserError, as the class."""
        self.data = fingerprint
        starts = self._starts()
        known = starts[-1].get("data") if starts and self._can_resume() else None
        if known not in (None, fingerprint):
            self.changed[DATA] = (known[:12], fingerprint[:12])
            self._refuse()

    def start(self, step: int) -> list[str]:
        """Write the record of a start at that step; returns the phases of the run so far, for the model's card."""
        starts = self._starts() if step else []
        starts.append(
            {
                "step": step,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": self.argv,
                "folder": str(Path.cwd()),
                "host": socket.gethostname(),
                "versions": versions(),
                "data": self.data,
                "changed": {key: [str(old), str(new)] for key, (old, new) in self.changed.items()},
            }
        )
        with whole_file(self.folder / STARTS) as unfinished:
            unfinished.write_text(json.dumps(starts, indent=1) + "\n", encoding="utf-8")
        with whole_file(self.folder / SETTINGS) as unfinished:
            unfinished.write_text(self.text, encoding="utf-8")
        return [
            f"from step {start['step']}: {key} {new} (before: {old})"
            for start in starts
            for key, (old, new) in start["changed"].items()
        ]

    def _can_resume(self) -> bool:
        place = self.folder / "checkpoints"
        return place.is_dir() and any(map(Checkpointer._is_checkpoint_dir, place.iterdir()))

    def _starts(self) -> list[dict[str, Any]]:
        try:
            return json.loads((self.folder / STARTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []

    def _refuse(self) -> None:
        if self.changed and not self.go_on:
            told = some_of([f"{key} was {old} and is {new}" for key, (old, new) in self.changed.items()])
            raise UserError(
                f"{self.folder} holds a run of other settings: {told}. Give them as they were, add --go_on to go on "
                "from its checkpoint under the new ones, or choose another --output_folder"
            )


def versions() -> dict[str, str]:
    """Of the package, Python and what numbers depend on."""
    found = {"cald_speech": cald_speech.__version__, "python": platform.python_version(), "system": sys.platform}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def resolved_yaml(settings: Settings, path: Path, overrides: str) -> str:
    """The experiment with its base, its references and the defaults written out: an experiment of its own."""
    tree = YAML().load(resolve_references(experiment_text(path, overrides)).getvalue())
    values = {f.name: getattr(settings, f.name) for f in fields(Settings) if f.init}
    for of, names in ((settings.guidance, options_of(type(settings.guidance))), (settings.loss, LossForm.options())):
        values |= {name: getattr(of, name) for name in sorted(names)}
    for key in [key for key in tree if key not in values]:
        del tree[key]
    for key, value in values.items():
        if key not in tree and isinstance(value, str | int | float | dict | Path | None):
            tree[key] = str(value) if isinstance(value, Path) else value
    text = StringIO()
    YAML().dump(tree, text)
    return f"# This run's settings, resolved, by cald_speech {cald_speech.__version__}.\n{text.getvalue()}"


def differences(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Each key whose value differs, with both values; keys that change nothing of what is learnt are left out.

    Example
    -------
    >>> dict(differences({"seed": 0, "num_steps": 5}, {"seed": 1, "num_steps": 9}))
    {'seed': (0, 1)}
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping) and _tag(before) == _tag(now):
        for name in dict.fromkeys([*before, *now]):
            if not place and (name in FREE or (name not in before and now[name] == DEFAULTS.get(name, MISSING))):
                continue  # the second: a key that this version has, and the one before had not
            if name == "test" and place.split(".")[0] == "corpus":
                continue  # a set that is scored, and never learnt from
            inside = f"{place}.{name}" if place else str(name)
            yield from differences(before.get(name), now.get(name), inside)
    elif _plain(before) != _plain(now):
        yield place, (_plain(before), _plain(now))


FREE = {f.name for f in fields(Settings) if f.metadata.get("free")}
DEFAULTS = {f.name: f.default for cls in (Settings, LossForm) for f in fields(cls)}


def _tag(node: Any) -> str | None:
    tag = getattr(node, "tag", None)
    return None if tag is None or tag.value is None else str(tag.value)


def _plain(node: Any) -> Any:
    """A part of a yaml tree without its formatting; objects as mappings that have their tag."""
    tag = _tag(node)
    if isinstance(node, Mapping):
        plain = {str(key): _plain(value) for key, value in node.items()}
        return plain if tag is None else {tag: plain}
    if isinstance(node, list | tuple):
        return [_plain(entry) for entry in node]
    if tag is not None:
        return {tag: str(getattr(node, "value", ""))}
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node
