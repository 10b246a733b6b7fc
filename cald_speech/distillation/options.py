"""An option of an experiment: name, default, meaning and the values that a run can have, declared in one place.

An option is a field of a dataclass: the settings, a guidance mode, the form of the loss, the schedule. :func:`option`
declares it, :func:`check_values` refuses what no run can have, :func:`meanings` is what ``--help`` shows.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "text", Mapping: "keys and values"}


def option(
    default: Any = MISSING,
    meaning: str = "",
    *,
    make: Callable[[], Any] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    infinite: bool = False,
    one_of: Sequence[str] = (),
    settable: bool = True,
    free: bool = False,
) -> Any:
    """A dataclass field that is an option; the bounds also hold for each number of a list.

    Arguments
    ---------
    default : its value where none is given; left out together with ``make``, a value must be given.
    meaning : for ``--help``; "" where the class's docstring has it under *Arguments*.
    make : makes the default, where that is an object of its own.
    at_least, above, at_most : bounds of a number.
    infinite : True allows infinity.
    one_of : the words that a text may be.
    settable : False, where an experiment cannot set it.
    free : True, where a run may go on under another value, since nothing that is learnt depends on it.

    Example
    -------
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Walk:
    ...     num_steps: int = option(3, "how far to go", at_least=1)
    >>> check_values(Walk(num_steps=0))
    Traceback (most recent call last):
    ValueError: num_steps: expected at least 1, got 0
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    metadata = {
        "meaning": meaning,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "infinite": infinite,
        "one_of": tuple(one_of),
        "settable": settable,
        "free": free,
    }
    return field(metadata=metadata, **({"default": default} if make is None else {"default_factory": make}))


def is_numeric(cls: type, name: str) -> bool:
    """Whether the option's value is a number, or a list of numbers."""
    return bool({int, float} & set(_kinds(get_type_hints(cls)[name])[0]))


def check_values(of: Any, prefix: str = "") -> None:
    """Raise ValueError, naming the option, for a value of another kind than its own or that no run can have."""
    types = get_type_hints(type(of))
    for f in fields(of):
        value, name = getattr(of, f.name), prefix + f.name
        kinds, listed = _kinds(types[f.name])
        _check_kind(name, value, types[f.name], kinds, listed)
        one_of = f.metadata.get("one_of")
        if one_of and value not in one_of:
            raise ValueError(f"{name}: expected one of {', '.join(one_of)}, got {value!r}")
        for number in value if listed and value is not None else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(name, number, f.metadata)


def _kinds(hint: Any) -> tuple[tuple[Any, ...], bool]:
    """The kinds that a value may be of, of the entries where it is a list; and whether it is one."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) in (Sequence, list, tuple) and set(get_args(kind)) & {int, float}:
            return (*get_args(kind), *(k for k in kinds if k is NoneType)), True
    return tuple(get_origin(kind) or kind for kind in kinds), False


def _check_kind(name: str, value: Any, hint: Any, kinds: tuple[Any, ...], listed: bool) -> None:
    if isinstance(hint, UnionType) and not {int, float} & set(kinds):
        if not isinstance(value, kinds):
            named = [WORDS.get(k, f"a {k.__name__}") for k in kinds if k is not NoneType]
            raise ValueError(f"{name}: expected {' or '.join(named)}, got {value!r}")
        return
    if isinstance(hint, UnionType) and value is None:
        return
    if listed and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise ValueError(f"{name}: expected a list of numbers, got {value!r}")
    kind = next(k for k in kinds if k is not NoneType)
    for entry in value if listed else [value]:
        fits = isinstance(entry, int | float if kind is float else kind)
        if not fits or (isinstance(entry, bool) and kind in (int, float)):
            raise ValueError(f"{name}: expected {WORDS.get(kind, f'a {kind.__name__}')}, got {entry!r}")


def _check_number(name: str, value: float, metadata: Mapping[str, Any]) -> None:
    if math.isnan(value) or (math.isinf(value) and not metadata.get("infinite", False)):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    bounds = metadata.get("bounds", {})
    if "at_least" in bounds and value < bounds["at_least"]:
        raise ValueError(f"{name}: expected at least {bounds['at_least']}, got {value}")
    if "above" in bounds and value <= bounds["above"]:
        raise ValueError(f"{name}: expected more than {bounds['above']}, got {value}")
    if "at_most" in bounds and value > bounds["at_most"]:
        raise ValueError(f"{name}: expected at most {bounds['at_most']}, got {value}")


def meanings(cls: type) -> dict[str, tuple[str, Any]]:
    """The options of a class, in order: what each means and its default (MISSING: it must be given).

    Example
    -------
    >>> from cald_speech.distillation import Hybrid
    >>> meanings(Hybrid)["alpha_logits"]
    ('weight of the logit loss (1 for TED-LIUM, else 0)', 0.0)
    """
    found = {}
    for f in fields(cls):
        if f.init and f.metadata.get("settable", True):
            default = f.default if f.default_factory is MISSING else f.default_factory
            found[f.name] = (f.metadata.get("meaning") or _documented(cls, f.name), default)
    return found


def _documented(cls: type, name: str) -> str:
    """What the docstring of a class says of an argument, or of the base class to which it refers; "" for nothing."""
    for base in cls.__mro__:
        _, _, arguments = inspect.cleandoc(base.__doc__ or "").partition("Arguments\n---------\n")
        for entry in re.split(r"\n(?=\S)", arguments.split("\n\n")[0]):
            names, _, text = entry.partition(" : ")
            if name in names.split(", ") and not re.match(r"as in :class:", text):
                text = re.sub(r":(?:class|func|data):`~?([\w.]+)`", r"\1", " ".join(text.split()))
                return text.replace("``", "").rstrip(".")
    return ""
