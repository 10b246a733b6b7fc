"""The demo's figure: word error rates with their intervals, and time for a minute of audio at two lengths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the rows of the demo's table into a PNG at ``path``, and return it."""
    names = [row["model"] for row in rows]
    figure, (errors, times) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    below = [row["WER %"] - row["low"] for row in rows]
    above = [row["high"] - row["WER %"] for row in rows]
    bars = errors.bar(names, [row["WER %"] for row in rows], yerr=[below, above], capsize=6, color=["0.6", "C1", "C0"])
    errors.bar_label(bars, fmt="%.1f", padding=8)
    errors.margins(y=0.18)  # room for the labels above the intervals
    errors.set(ylabel="WER %, with 95 % interval", title="Unseen voices and sentences")
    for offset, label in ((-0.2, "s/min at 10 s"), (0.2, "s/min at 10 min")):
        places = [i + offset for i in range(len(rows))]
        bars = times.bar(places, [row[label] for row in rows], width=0.38, label=label.removeprefix("s/min "))
        times.bar_label(bars, fmt="%.2f")
    times.set(ylabel="seconds for a minute of audio", title="One forward pass", xticks=range(len(rows)))
    times.set_xticklabels(names)
    times.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
