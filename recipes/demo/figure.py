"""Figures: the demo's word error rates and times, and of compare.py the word error rates against steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

from cald_speech.files import whole_file

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
    return _save(figure, path)


def draw_steps(rows: Sequence[Mapping[str, Any]], teacher: float, path: Path) -> Path:
    """Draw WER against steps into a PNG: a dot for each run, a line through the means of the seeds of a mixer."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, mixer in enumerate(dict.fromkeys(row["mixer"] for row in rows)):
        own = [row for row in rows if row["mixer"] == mixer]
        steps = sorted({row["steps"] for row in own})
        means = [fmean(row["WER %"] for row in own if row["steps"] == count) for count in steps]
        axes.plot(steps, means, color=f"C{number}", label=mixer)
        axes.plot([row["steps"] for row in own], [row["WER %"] for row in own], "o", color=f"C{number}", markersize=4)
    axes.axhline(teacher, color="0.3", linewidth=0.8, linestyle="--", label="teacher")
    axes.set(xlabel="steps", ylabel="WER % of the test set", xscale="log", yscale="log")
    ticks = sorted({row["steps"] for row in rows})
    axes.set_xticks(ticks, labels=map(str, ticks), minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yticks(marks := (5, 6, 7, 8, 10, 12, 15, 20), labels=map(str, marks))
    axes.set_yticks([], minor=True)
    axes.legend(fontsize=8)
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)
    return path
