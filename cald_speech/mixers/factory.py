"""Mixer factories as plain data, so that a layer map can stand in a config.json and a yaml alike.

A factory is a mixer class or a ``functools.partial`` of one (what HyperPyYAML's ``!name:`` gives). As data it is
``{"mixer": class name, **keyword arguments}``; an argument that is itself a factory becomes such a dictionary too.
"""

from functools import partial
from typing import Any

from cald_speech.mixers.base import Mixer, MixerFactory


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
        raise ValueError(f"expected a Mixer class or a partial of one with keyword arguments, got {factory!r}")
    described = {name: describe_factory(v) if callable(v) else v for name, v in keywords.items()}
    return {"mixer": func.__name__, "arguments": described}


def factory_from(description: dict[str, Any]) -> MixerFactory:
    """The factory that :func:`describe_factory` described. Raises ValueError for a mixer that is not known.

    Known are all subclasses of Mixer that have been imported: cald_speech's own, and a user's after importing it.
    """
    classes = _known_mixers(Mixer)
    name = description.get("mixer")
    if name not in classes:
        raise ValueError(
            f"mixer {name!r} is not known: expected one of {', '.join(sorted(classes))}. "
            "If it is your own, import its module before loading the model"
        )
    arguments = {
        key: factory_from(value) if isinstance(value, dict) and "mixer" in value else value
        for key, value in description["arguments"].items()
    }
    return partial(classes[name], **arguments)


def _known_mixers(base: type[Mixer]) -> dict[str, type[Mixer]]:
    known = {c.__name__: c for sub in base.__subclasses__() for c in (sub, *_known_mixers(sub).values())}
    return {name: c for name, c in known.items() if c.forward is not Mixer.forward}  # what can be run
