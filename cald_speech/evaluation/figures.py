"""Figures of evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cald_speech.files import whole_file


def draw_by_length(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """WER against the seconds of a recording, and insertions and deletions per minute under stress, as a PNG."""
    figure, (lengths, stress) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        pauses = dict.fromkeys(row["condition"].split(", ")[1] for row in own if row["condition"].startswith("x "))
        for pause, style in zip(pauses, ("-o", "--s", ":^"), strict=False):
            line = [row for row in own if row["condition"].endswith(pause)]
            label = f"{model}, {pause}"
            lengths.plot(
                [r["s each"] for r in line], [r["WER %"] for r in line], style, color=f"C{number}", label=label
            )
        troubles = [row for row in own if row["condition"].startswith("stress")]
        places = [i + 0.8 * number / len(models) for i in range(len(troubles))]
        width = 0.8 / len(models)
        stress.bar(places, [r["ins/min"] for r in troubles], width, color=f"C{number}", label=f"{model}: insertions")
        below = [-r["del/min"] for r in troubles]
        stress.bar(places, below, width, color=f"C{number}", alpha=0.5, label=f"{model}: deletions")
        stress.set_xticks(
            range(len(troubles)), [r["condition"].removeprefix("stress: ") for r in troubles], rotation=20
        )
    lengths.set(xscale="log", xlabel="seconds of a recording", ylabel="WER %", title="Joined utterances")
    stress.axhline(0, color="0.3", linewidth=0.8)
    stress.set(ylabel="insertions (up), deletions (down) per minute", title="Stress")
    for axes in (lengths, stress):
        axes.legend(fontsize=7)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)
    return path
