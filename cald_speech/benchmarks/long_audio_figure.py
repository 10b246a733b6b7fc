"""The figure of the long-audio benchmark: time and memory against duration, and where the lines cross."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cald_speech.files import whole_file

Line = Sequence[tuple[float, float]]


def crossover(a: Line, b: Line) -> tuple[float, float] | None:
    """Where two lines through (duration, value) points cross on logarithmic axes; None where they do not.

    Example
    -------
    >>> x, y = crossover([(1, 1.0), (100, 100.0)], [(1, 10.0), (100, 10.0)])
    >>> round(x), round(y)
    (10, 10)
    """
    first, second = dict(a), dict(b)
    shared = sorted(first.keys() & second.keys())
    for left, right in pairwise(shared):
        apart = [math.log(first[x] / second[x]) for x in (left, right)]
        if apart[0] * apart[1] < 0:
            along = apart[0] / (apart[0] - apart[1])
            mix = lambda p, q: math.exp((1 - along) * math.log(p) + along * math.log(q))  # noqa: B023, E731
            return mix(left, right), mix(first[left], first[right])
    return None


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the rows of the table into a PNG at ``path``, and return it."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    systems = list(dict.fromkeys(row["system"] for row in rows))
    for axes, key, label in zip(panels, ("seconds", "peak GiB"), ("seconds", "peak memory, GiB"), strict=True):
        lines = {s: [(r["duration_s"], r[key]) for r in rows if r["system"] == s and key in r] for s in systems}
        for number, (system, line) in enumerate(lines.items()):
            if line:
                axes.plot(*zip(*line, strict=True), "-o", color=f"C{number}", label=system, markersize=4)
        for other in systems[1:]:
            if (point := crossover(lines[systems[0]], lines[other])) is not None:
                axes.plot(*point, "kx", markersize=8)
                axes.annotate(f"{point[0]:.0f} s", point, textcoords="offset points", xytext=(6, -10), fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="seconds of audio", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)
    return path
