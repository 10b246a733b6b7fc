"""Mixer factories as plain data, so that a layer map can stand in a config.json and a yaml alike.

A factory is a mixer class or a ``functools.partial`` of one (what HyperPyYAML's ``!name:`` gives). As data it is
``{"mixer": class name, **keyword arguments}``; an argument that is itself a factory becomes such a dictionary too.
"""

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from cald_speech.mixers.base import Mixer, MixerFactory

MOST_DEPTH = 4  # of mixers in mixers
# What a number may be, by the name of the option: in every mixer of ours it means the same.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("head_dim", "d_state", "n_groups", "k", "max_length", "window"), (1, 2**16)),
    **{"dt_rank": (1, 2**16), "decay_rank": (1, 2**16)},
    **{"d_conv": (0, 64), "expand": (1e-6, 64), "chunk_size": (1, 2**20)},
}
PAIRS = ("dt_range", "A_range")
CHOICES = {
    "activation": ("silu", "identity"),
    "sharing": ("none", "kv", "layer"),
    "backend": ("auto", "naive", "torch", "native", "triton"),
}
SWITCHES = (
    "bias",
    "skip",
    "share_projections",
    "position_bias",
    "distance_keys",
    "per_channel",
    "negative_eigenvalues",
)
FRACTIONS = ("expand",)
MAY_BE_NONE = ("head_dim", "d_state", "n_groups", "dt_rank", "decay_rank", "chunk_size")


def describe_factory(factory: MixerFactory) -> dict[str, Any]:
    """A factory as a dictionary of JSON values.

    Example
    -------
    >>> from cald_speech.mixers import Bidirectional, Mamba2
    >>> describe_factory(partial(Bidirectional, mixer=Mamba2, share_projections=True))
    {'mixer': 'Bidirectional', 'arguments': {'mixer': {'mixer': 'Mamba2', 'arguments': {}}, 'share_projections': True}}
    """
    func, keywords = (factory.func, factory.keywords) if isinstance(factory, partial) else (factory, {})
    if not (isinstance(func, type) and issubclass(func, Mixer)) or (isinstance(factory, partial) and factory.args):
        raise ValueError(f"expected a Mixer class or a partial of one with keyword arguments, got {factory!r:.60}")
    described = {name: describe_factory(v) if callable(v) else v for name, v in keywords.items()}
    return {"mixer": func.__name__, "arguments": described}


def factory_classes(factory: MixerFactory) -> set[type[Mixer]]:
    """The mixer class that a factory builds, and those that it names in its options.

    Example
    -------
    >>> from cald_speech.mixers import Bidirectional, Mamba2
    >>> sorted(cls.__name__ for cls in factory_classes(partial(Bidirectional, mixer=Mamba2)))
    ['Bidirectional', 'Mamba2']
    """
    func, keywords = (factory.func, factory.keywords) if isinstance(factory, partial) else (factory, {})
    return {func}.union(*(factory_classes(v) for v in keywords.values() if callable(v)))


def factory_from(description: Mapping[str, Any], depth: int = 1) -> MixerFactory:
    """The factory that :func:`describe_factory` described, whose options have been checked.

    Known are all subclasses of Mixer that have been imported: cald_speech's own, and a user's after importing it.
    Raises ValueError for a mixer that is not known, an option that it does not have, and a value that no mixer has.
    """
    if depth > MOST_DEPTH:
        raise ValueError(f"expected mixers in mixers up to {MOST_DEPTH} deep, got more")
    if not isinstance(description, Mapping) or not isinstance(description.get("arguments"), Mapping):
        raise ValueError(f"expected a mixer's name and its arguments, got {description!r:.60}")
    classes, name = _known_mixers(Mixer), description.get("mixer")
    if not isinstance(name, str) or name not in classes:
        raise ValueError(
            f"mixer {name!r:.60} is not known: expected one of {', '.join(sorted(classes))}. "
            "If it is your own, import its module before loading the model"
        )
    arguments = {
        key: factory_from(value, depth + 1) if isinstance(value, Mapping) and "mixer" in value else value
        for key, value in description["arguments"].items()
    }
    factory = partial(classes[name], **arguments)
    check_options(factory)
    return factory


def check_options(factory: MixerFactory) -> None:
    """Raise ValueError for an option of a wrong kind or range, or of a name that the mixer does not have.

    A mixer of a user's own checks what has other names than those of ours.

    Example
    -------
    >>> from cald_speech.mixers import Mamba2
    >>> try:
    ...     check_options(partial(Mamba2, d_state=-4))
    ... except ValueError as error:
    ...     print(error)
    d_state: expected a whole number from 1 to 65536, got -4
    """
    func, keywords = (factory.func, factory.keywords) if isinstance(factory, partial) else (factory, {})
    parameters = inspect.signature(func).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in keywords.items():
        if not takes_more and (name not in parameters or name in ("d_model", "num_heads")):
            raise ValueError(f"{name}: {func.__name__} has no such option; it has {', '.join([*parameters][2:])}")
        if callable(value):
            check_options(value)
        elif expected := _not_as_expected(name, value):
            raise ValueError(f"{name}: expected {expected}, got {value!r:.60}")


def _not_as_expected(name: str, value: Any) -> str | None:
    """What an option should have been; None for one that is."""
    if name in CHOICES:
        return None if value in CHOICES[name] else f"one of {', '.join(CHOICES[name])}"
    if name in SWITCHES:
        return None if isinstance(value, bool) else "True or False"
    if name in PAIRS:
        pair = isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(v) for v in value)
        return None if pair and 0 < value[0] <= value[1] <= 1e6 else "two numbers, 0 < low <= high"
    if name == "mixer":
        return "a mixer"  # one that is has been taken apart before
    if name not in RANGES or (value is None and name in MAY_BE_NONE):
        return None
    low, high = RANGES[name]
    whole = name not in FRACTIONS
    fits = _is_number(value) and low <= value <= high and not (whole and not isinstance(value, int))
    return None if fits else f"a {'whole ' if whole else ''}number from {low:g} to {high}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _known_mixers(base: type[Mixer]) -> dict[str, type[Mixer]]:
    known = {c.__name__: c for sub in base.__subclasses__() for c in (sub, *_known_mixers(sub).values())}
    return {name: c for name, c in known.items() if c.forward is not Mixer.forward}  # what can be run
