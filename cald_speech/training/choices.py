"""For yamls that serve several corpora: what depends on which of them it is stands in one table."""

from collections.abc import Mapping
from typing import Any


def choose(table: Mapping[str, Any], *keys: str) -> Any:
    """``table[key]`` for one key after the other; a yaml says ``!apply:cald_speech.training.choices.choose``.

    Raises
    ------
    ValueError
        which names the known ones, for a key that is not there. In a yaml that is a UserError.

    Example
    -------
    >>> choose({"sst2": {"switch_step": 5000}, "imdb": {"switch_step": 3000}}, "imdb", "switch_step")
    3000
    """
    for key in keys:
        if key not in table:
            raise ValueError(f"expected one of {', '.join(table)}, got {key!r}")
        table = table[key]
    return table
