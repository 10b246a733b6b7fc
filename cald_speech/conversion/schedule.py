"""The conversion schedule: which layers of a student are converted at which optimiser step, a group at a time.

A layer's mixer starts from the attention weights that it then has: those that training has brought it to, among layers
that are converted already.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cald_speech.conversion.layer_map import LayerMap
from cald_speech.errors import UserError

ORDERS = ("top", "bottom")


@dataclass(frozen=True)
class ConversionSchedule:
    """At each of ``steps`` a group of layers, before that step is taken.

    Arguments
    ---------
    steps : ascending. The layers that the layer map converts are shared out evenly, earlier groups being the larger.
    order : ``top`` begins with the last layer, ``bottom`` with the first. A list of layers is an order of its own. The
        path of a layer_importance.json (``cald-speech layers``) begins with the layer that costs least.

    Raises
    ------
    UserError
        for steps that do not ascend.

    Example
    -------
    >>> schedule = ConversionSchedule([0, 100, 200])
    >>> schedule.groups([0, 1, 2, 3, 5])
    [(5, 3), (2, 1), (0,)]
    """

    steps: Sequence[int]
    order: str | Sequence[int] = "top"

    def __post_init__(self) -> None:
        steps = self.steps
        sound = isinstance(steps, Sequence) and not isinstance(steps, str) and all(type(step) is int for step in steps)
        if not sound or not steps or steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
            raise UserError(
                "conversion_schedule.steps: expected optimiser steps that ascend, from 0 on, such as [0, 100, 200], "
                f"got {steps!r}"
            )

    def groups(self, layers: Collection[int]) -> list[tuple[int, ...]]:
        """The layers of each step. ``layers`` are those to convert; raises UserError where these are fewer than steps,
        or are not those of the order."""
        ordered, count = self._ordered(sorted(layers)), len(self.steps)
        if len(ordered) < count:
            raise UserError(
                f"conversion_schedule.steps: expected at most {len(ordered)} steps, one for each layer that layer_map "
                f"converts, got {count}"
            )
        larger, size = len(ordered) % count, len(ordered) // count
        ends = [size * i + min(i, larger) for i in range(count + 1)]
        return [tuple(ordered[a:b]) for a, b in pairwise(ends)]

    def _ordered(self, layers: list[int]) -> list[int]:
        if self.order in ORDERS:
            return layers[::-1] if self.order == "top" else layers
        if isinstance(self.order, str):
            order, place = ranked_cheapest_first(Path(self.order)), f"conversion_schedule.order: {self.order}"
            # It may rank layers that the map keeps.
            order = [layer for layer in order if layer in layers]
        else:
            order, place = list(self.order), "conversion_schedule.order"
        if sorted(order) != layers:
            raise UserError(
                f"{place}: expected each of the layers that layer_map converts once ({', '.join(map(str, layers))}), "
                f"got {', '.join(map(str, order)) or 'none'}"
            )
        return order


def ranked_cheapest_first(path: Path) -> list[int]:
    """The layers of a layer_importance.json, from the one whose conversion costs least. Raises UserError for others."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return [int(row["layer"]) for row in reversed(rows)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"conversion_schedule.order: expected top, bottom, a list of layers, or the layer_importance.json that "
            f"`cald-speech layers` writes, got {str(path)!r}, which cannot be read as that ({error})"
        ) from error


def converted_before(layer_map: LayerMap, groups: Sequence[tuple[int, ...]], num_layers: int) -> LayerMap:
    """The part of a layer map that these groups are: attention in every other layer.

    Example
    -------
    >>> from cald_speech.mixers import Mamba2
    >>> converted_before(LayerMap(Mamba2), [(3,), (2,)], 4).overrides
    {0: None, 1: None}
    """
    converted = {layer for group in groups for layer in group}
    kept = {layer: None for layer in range(num_layers) if layer not in converted}
    return LayerMap(layer_map.default, {**layer_map.overrides, **kept})
