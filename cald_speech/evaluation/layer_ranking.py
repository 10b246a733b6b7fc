"""From what converting each layer costs to the layers that keep their attention."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from cald_speech.evaluation.layer_costs import Comparison
from cald_speech.evaluation.report import format_table
from cald_speech.tasks.wer import EvaluationResult, compare

RANKED_BY = {"wer": "wer_added", "kl": "kl", "distance": "distance_at_end"}


def row_of(layer: int, found: Comparison, own: EvaluationResult, *, remembers: Comparison) -> dict[str, Any]:
    """The figures of the teacher with ``layer`` converted, against the teacher's own words.

    ``remembers`` : the model in which the layer's mixer worked when its memory was measured.
    """
    distances = found.distances.values()
    return {
        "layer": layer,
        **words_of(found.result, own),
        "kl": found.divergence.values(),
        "distance_after_layer": distances[layer],
        "distance_at_end": distances[-1],
        "memory_frames": remembers.memory_frames[layer],
    }


def words_of(result: EvaluationResult, own: EvaluationResult) -> dict[str, Any]:
    """WER in percent, and what it adds to the teacher's, paired over utterances; None where that is unknown."""
    if not own.words.count:
        return {"wer": None, "wer_added": None, "wer_added_interval": None}
    added = result.words.rate - own.words.rate
    interval = compare(result, own)[1:] if len(own.utterances) > 1 else None
    return {"wer": result.words.rate, "wer_added": added, "wer_added_interval": interval}


def ranked(rows: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Costliest first; equal costs by KL.

    Example
    -------
    >>> rows = [{"layer": 0, "wer_added": 1.0, "kl": 0.1}, {"layer": 1, "wer_added": 1.0, "kl": 0.3}]
    >>> [row["layer"] for row in ranked(rows, "wer")]
    [1, 0]
    """
    key = RANKED_BY[by]
    return sorted(rows, key=lambda row: (-(row[key] or 0.0), -row["kl"], row["layer"]))


def border(rows: Sequence[dict[str, Any]], compared: Mapping[Any, Comparison], keep: int) -> dict[str, Any] | None:
    """How the last layer that is kept and the first that is not differ in WER, paired; None where that is unknown."""
    if keep == len(rows) or rows[0]["wer_added_interval"] is None:
        return None
    kept, converted = (row["layer"] for row in rows[keep - 1 : keep + 1])
    difference, low, high = compare(compared[kept].result, compared[converted].result)
    return {"kept": kept, "converted": converted, "wer_difference": difference, "interval": [low, high]}


def overrides_yaml(layers: Sequence[int]) -> str:
    """A layer map's overrides that keep attention in ``layers``, for an experiment's yaml.

    Example
    -------
    >>> print(overrides_yaml([5, 11]))
    layer_map:
        overrides: {5: null, 11: null} # counted from 0; null keeps attention
    """
    kept = ", ".join(f"{layer}: null" for layer in layers)
    return f"layer_map:\n    overrides: {{{kept}}} # counted from 0; null keeps attention"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The ranking for people; memory is the median over heads, with the smallest and the largest, in frames."""
    lines = []
    for row in rows:
        interval = row["wer_added_interval"]
        line = {"layer": row["layer"], "mixer": row["mixer"], "WER %": row["wer"], "added": row["wer_added"]}
        line["95 % interval"] = None if interval is None else "{:.2f} to {:.2f}".format(*interval)
        line |= {
            "KL": f"{row['kl']:.4f}",
            "distance after it": f"{row['distance_after_layer']:.4f}",
            "at the end": f"{row['distance_at_end']:.4f}",
        }
        for direction, heads in row["memory_frames"].items():
            line[f"memory {direction}"] = f"{median(heads):.0f} ({min(heads):.0f} to {max(heads):.0f})"
        lines.append(line)
    return format_table(lines)
