"""Figures of evaluations: WER against length, drift, and what converting a layer costs.

The rows and the ``found`` that they draw are those that `cald-speech by-length`, `drift` and `layers` write as JSON.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cald_speech.distillation.drift import LARGE, PUBLISHED_ON_SPEECH, SMALL
from cald_speech.files import whole_file

MARKERS = {"forwards": ">", "backwards": "<"}


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
    return _save(figure, path)


def draw_drift(found: Mapping[str, Any], path: Path) -> Path:
    """The cosine distance from SOURCE in each layer, and over the waypoints, as a PNG; ``found`` is drift.json's."""
    waypoints = found["waypoints"]
    figure, panels = plt.subplots(1, 2 if waypoints else 1, figsize=(11 if waypoints else 6, 4), layout="constrained")
    layers, *over_steps = panels if waypoints else (panels,)
    for number, waypoint in enumerate(waypoints):
        colour = plt.cm.viridis(number / len(waypoints))
        named = number % max(1, len(waypoints) // 5) == 0  # a legend of every one would hide the lines
        label = f"source to step {waypoint['step']}" if named else None
        layers.plot(waypoint["from_source"], "-", color=colour, label=label)
    layers.plot(found["layers"], "k-o", label="source to teacher")
    layers.set(xlabel="layer", xticks=_ticks(len(found["layers"])), title="Hidden states after each layer")
    for axes in over_steps:
        steps = [waypoint["step"] for waypoint in waypoints]
        axes.plot(steps, [fmean(w["from_source"]) for w in waypoints], "-o", label="source to waypoint")
        axes.plot(steps, [fmean(w["to_teacher"]) for w in waypoints], "-s", label="waypoint to teacher")
        axes.axhline(PUBLISHED_ON_SPEECH, color="0.6", linestyle=":", label="the paper's speech model, 2,000 steps")
        axes.set(xlabel="optimiser step of the waypoint", title="Mean over the layers")
    for axes in (layers, *over_steps):
        for border, name in ((LARGE, "large (our reading)"), (SMALL, "small (our reading)")):
            axes.axhline(border, color="0.6", linewidth=0.8, linestyle="--")
            axes.annotate(name, (0.01, border), xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
        axes.set(ylabel="cosine distance", ylim=(0, max(0.45, 1.1 * axes.get_ylim()[1])))
        axes.legend(fontsize=7, loc="upper right", ncols=2)
    return _save(figure, path)


def draw_importance(found: Mapping[str, Any], path: Path) -> Path:
    """What each layer costs, how far the states move, and how long each head remembers, as a PNG.

    ``found`` is layer_importance.json's.
    """
    figure, ((words, divergence), (distance, memory)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    rows = sorted(found["layers"], key=lambda row: row["layer"])
    places = [row["layer"] for row in rows]
    _draw_words(words, rows)
    divergence.bar(places, [row["kl"] for row in rows], color="C1")
    divergence.set(ylabel="KL from the teacher, nats a frame", title="Output distribution, this layer alone converted")
    distance.plot(places, [row["distance_after_layer"] for row in rows], "-o", label="alone, after the layer itself")
    distance.plot(places, [row["distance_at_end"] for row in rows], "-s", label="alone, after the last layer")
    if found["student"] is not None:
        distance.plot(found["student"]["distances"], "k--^", label="the student, all its layers at once")
    distance.set(ylabel="cosine distance to the teacher", title="Hidden states", ylim=(0, None))
    distance.legend(fontsize=7)
    _draw_memory(memory, rows)
    for axes in (words, divergence, distance, memory):
        axes.set(xlabel="layer", xticks=_ticks(found["num_layers"]), xlim=(-0.6, found["num_layers"] - 0.4))
    return _save(figure, path)


def draw_restoring(found: Mapping[str, Any], path: Path) -> Path:
    """KL and WER against the layers whose attention came back, as a PNG; ``found`` is restoring.json's."""
    figure, (divergence, words) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    numbers = [len(step["restored"]) for step in found["steps"]]
    divergence.plot(numbers, [step["kl"] for step in found["steps"]], "-o")
    divergence.set(ylabel="KL from the teacher, nats a frame", ylim=(0, None))
    if found["teacher_wer"] is not None:
        words.plot(numbers, [step["wer"] for step in found["steps"]], "-o", label="student")
        words.axhline(found["teacher_wer"], color="0.3", linewidth=0.8, label="teacher")
        words.legend(fontsize=7)
    words.set(ylabel="WER, %", ylim=(0, None))
    for axes in (divergence, words):
        axes.set(xlabel="layers with attention restored", xticks=numbers)
    return _save(figure, path)


def _draw_words(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    """Bars of the WER that converting a layer adds; nothing where there are no words."""
    known = [row for row in rows if row["wer_added"] is not None]
    for row in known:
        axes.bar(row["layer"], row["wer_added"], color="C0")
        axes.vlines(row["layer"], *(row["wer_added_interval"] or (0, 0)), color="0.2")
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(ylabel="WER minus the teacher's, points", title="Words, this layer alone converted (95 % intervals)")


def _draw_memory(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    """One mark for each head, directions side by side."""
    for row in rows:
        for side, (direction, heads) in enumerate(row["memory_frames"].items()):
            place = [row["layer"] + 0.3 * side - 0.15] * len(heads)
            axes.plot(place, heads, MARKERS[direction], color=f"C{side}", alpha=0.7, label=direction)
    axes.set(ylabel="frames until 1 % is left", title="Effective memory of each head")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        axes.set_yscale("log")
        axes.legend(handles.values(), handles.keys(), fontsize=7)
    else:
        axes.text(0.5, 0.5, "no mixer with a decay", ha="center", va="center", transform=axes.transAxes)


def _ticks(num_layers: int) -> range:
    return range(0, num_layers, max(1, num_layers // 12))


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)
    return path
