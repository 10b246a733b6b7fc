"""An experiment's yaml is a program: HyperPyYAML calls what its tags name. Here all of it is looked at before any runs.

:func:`check` reads the text as events, which builds nothing, and bounds its size, its depth, and what its aliases and
references would grow to. Tags may name the classes and functions of this package, config classes of transformers,
modules and optimisers of torch, augmenters of speechbrain, and peft. Modules of one's own are let in by the
environment, never by the yaml: ``CALD_SPEECH_MODULES=my_package,another``. :func:`build` makes the objects of a text
that has been checked.
"""

import inspect
import os
import pydoc
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent
from transformers import PretrainedConfig

from cald_speech.errors import UserError

OWN_MODULES = "CALD_SPEECH_MODULES"
MOST_CHARACTERS = 2**20
MOST_NODES = 50_000  # aliases and references counted as what they stand for
MOST_DEPTH = 32
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
REFERENCES = {"!ref", "!copy"}
CALLS = ("!new:", "!name:", "!apply:")
FUNCTIONS = {"sysconfig.get_path"}  # of others: where Python's own library is, a corpus that everybody has
OF_TORCH = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


def check(text: str, place: str) -> None:
    """Raise UserError, which names ``place``, unless ``text`` is small, finite, and names only what a yaml may.

    Example
    -------
    >>> check("seed: 3", "mine.yaml")
    >>> try:
    ...     check("seed: !apply:os.getpid []", "mine.yaml")
    ... except UserError as error:
    ...     print(str(error)[:62])
    mine.yaml, line 1: the tag !apply:os.getpid is not one that an
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{place}: expected an experiment of up to {MOST_CHARACTERS:,} characters, got {len(text):,}")
    if re.search("^%", text, re.MULTILINE):
        raise UserError(
            f"{place}: expected an experiment without directives, which could rename tags, got a line with %"
        )
    try:
        for event in _bounded_events(text, place):
            tag = "" if isinstance(event, AliasEvent) else str(event.tag or "")
            if tag and tag not in PLAIN | REFERENCES | {"!", "!tuple", "!PLACEHOLDER"}:
                _check_tag(tag, f"{place}, line {event.start_mark.line + 1}")
        tree = YAML().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{place}, line {mark.line + 1}" if mark else place
        raise UserError(f"{line}: expected yaml, which this is not: {error.problem or error.context}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: expected yaml, which this is not: {error}") from error
    _check_references(tree, place)


def build(text: str) -> Any:
    """The values and objects that a checked text stands for."""
    return load_hyperpyyaml(text)


def _bounded_events(text: str, place: str) -> Iterator[NodeEvent]:
    """The nodes one by one; stops with a UserError where they are too many or too deep, or hold themselves."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in YAML().parse(text):
        line = f"{place}, line {event.start_mark.line + 1}" if event.start_mark else place
        if isinstance(event, CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MOST_DEPTH:
                raise UserError(f"{line}: expected values nested up to {MOST_DEPTH} deep, got more")
            yield event
            continue
        elif isinstance(event, AliasEvent):
            if event.anchor not in sizes:
                raise UserError(f"{line}: *{event.anchor} stands for nothing that is whole before this line")
            anchor, size = None, sizes[event.anchor]
            yield event
        elif isinstance(event, ScalarEvent):
            anchor, size = event.anchor, 1
            yield event
        else:
            continue
        if anchor:
            sizes[anchor] = size
        open_nodes[-1] = (open_nodes[-1][0], open_nodes[-1][1] + size)
        if open_nodes[-1][1] > MOST_NODES:
            raise UserError(f"{line}: expected up to {MOST_NODES:,} values, got more, with what aliases stand for")


def _check_tag(tag: str, place: str) -> None:
    call = next((call for call in CALLS if tag.startswith(call)), None)
    if call is not None and _may_be_named(tag.removeprefix(call), place):
        return
    raise UserError(
        f"{place}: the tag {tag} is not one that an experiment may have: expected !ref, !copy, or one of "
        f"{', '.join(CALLS)} with a class or function of cald_speech, a config class of transformers, a module or "
        f"optimiser of torch, an augmenter of speechbrain, or peft. For a module of your own, say "
        f"{OWN_MODULES}=its_name in the environment"
    )


def _may_be_named(name: str, place: str) -> bool:
    """Whether a tag may have this dotted name. Only modules of a list are imported to find out."""
    root, own = name.partition(".")[0], _own_modules()
    if name in FUNCTIONS or root in own:
        return True
    if root not in RULES:
        return False
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"{place}: {name} cannot be imported: {error.value}") from error
    if found is None and root == "peft" and find_spec(root) is None:
        raise UserError(
            f"{place}: {name} needs the package peft, which is not installed: pip install 'cald-speech[peft]', or "
            "leave the adapters out"
        )
    if found is None:
        raise UserError(f"{place}: there is no {name}: expected the name of a class or function, such as {EXAMPLE}")
    return RULES[root](found)


def _own_modules() -> set[str]:
    return {name.strip() for name in os.environ.get(OWN_MODULES, "").split(",")} - {""}


def _is_of(package: str) -> Callable[[Any], bool]:
    """Whether a class or function was defined in the package: what a module of it imported is not."""
    return lambda found: (
        (inspect.isclass(found) or inspect.isroutine(found)) and str(found.__module__).split(".")[0] == package
    )


def _is_a(*classes: type) -> Callable[[Any], bool]:
    return lambda found: inspect.isclass(found) and issubclass(found, classes)


EXAMPLE = "cald_speech.mixers.Mamba2"
RULES = {
    "cald_speech": _is_of("cald_speech"),
    "transformers": _is_a(PretrainedConfig),
    "torch": _is_a(*OF_TORCH),
    "peft": _is_of("peft"),
    "speechbrain": lambda found: _is_a(torch.nn.Module)(found) and found.__module__.startswith("speechbrain.augment."),
}


# --- references: <key> in a text stands for the value of another key --------------------------------------------------


def _check_references(tree: Any, place: str) -> None:
    """Raise UserError where references go round in a circle, or grow beyond all bounds."""
    known: dict[int, int] = {}
    if isinstance(tree, Mapping):
        _grown(tree, tree, place, known, [])


def _grown(node: Any, tree: Mapping[str, Any], place: str, known: dict[int, int], path: list[int]) -> int:
    """How many values a node stands for, with those that its references name."""
    if id(node) in known:
        return known[id(node)]
    value = getattr(node, "value", node)  # a tagged scalar's text
    if isinstance(value, Mapping | list):
        parts = list(value.values() if isinstance(value, Mapping) else value)
    elif isinstance(value, str) and "<" in value:
        parts = [found for ref in re.findall(r"<([^>]*)>", value) if (found := _named(ref, tree)) is not None]
        if any(ref.partition(".")[2].startswith("_") for ref in re.findall(r"<([^>]*)>", value)):
            raise UserError(f"{place}: expected references to keys and what they say openly, got {value!r:.60}")
        if parts and "**" in value:
            raise UserError(f"{place}: expected sums and products of references, got the power in {value!r}")
    else:
        parts = []
    if id(node) in path or len(path) > 4 * MOST_DEPTH:
        raise UserError(f"{place}: the reference in {value!r} leads back to itself, or over too many others")
    size = 1 + sum(_grown(part, tree, place, known, [*path, id(node)]) for part in parts)
    if size > MOST_NODES:
        raise UserError(f"{place}: expected up to {MOST_NODES:,} values, got more, with what references stand for")
    if parts:
        known[id(node)] = size  # only what the tree holds: a plain number's id may be another's later
    return size


def _named(reference: str, tree: Mapping[str, Any]) -> Any:
    branch: Any = tree
    for part in reference.partition(".")[0].split("["):
        if not isinstance(branch, Mapping) or part.strip("]") not in branch:
            return None  # HyperPyYAML says so, with the key
        branch = branch[part.strip("]")]
    return branch
