"""What classifiers say of the same utterances, side by side: accuracy, who alone is right, the difference paired."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from cald_speech.tasks.bootstrap import bootstrap_interval, paired_bootstrap

Guesses = Mapping[str, tuple[str, str]]
"""(label, guess) of each utterance."""


def label_rows(
    found: Mapping[str, Sequence[Guesses]], *, drawn_by: Mapping[str, Hashable] | None = None
) -> list[dict[str, Any]]:
    """A row for the majority class, and for each model with its intervals and its difference from the first.

    Arguments
    ---------
    found : for each model what each of its seeds guessed; the first is the teacher, with as many seeds or one for all.
    drawn_by : what utterances are drawn together for the 95 % intervals, such as their speaker; None: each by itself.

    Returns
    -------
    "right", "it alone" and "teacher alone" are summed over the seeds, ``of`` counts all of them; an accuracy is their
    mean, and intervals are of the mean.

    Example
    -------
    >>> teacher = {"a": ("x", "x"), "b": ("y", "x"), "c": ("x", "x")}
    >>> student = {"a": ("x", "y"), "b": ("y", "y"), "c": ("x", "x")}
    >>> _, _, row = label_rows({"teacher": [teacher], "student": [student]})
    >>> row["right"], row["it alone"], row["teacher alone"]
    (2, 1, 1)
    """
    first, *_ = found
    ids = sorted(found[first][0])
    labels = [found[first][0][i][0] for i in ids]
    groups = None if drawn_by is None else [drawn_by[i] for i in ids]
    majority, count = Counter(labels).most_common(1)[0]
    rows = [{"model": f"majority class ({majority})", "right": count, "of": len(ids)}]
    rows[0]["accuracy %"] = 100 * count / len(ids)
    right = {name: np.array([[one[i][0] == one[i][1] for i in ids] for one in of]) for name, of in found.items()}
    ones = np.ones(len(ids), int)
    for name, hits in right.items():
        teacher = np.broadcast_to(right[first], hits.shape)
        row = {"model": name, "right": int(hits.sum()), "of": hits.size, "accuracy %": 100 * hits.mean()}
        row |= dict(zip(("low", "high"), bootstrap_interval(hits.mean(0), ones, groups=groups), strict=True))
        if len(hits) > 1:
            row["seeds"] = " ".join(f"{100 * one.mean():.2f}" for one in hits)
        row |= {"it alone": int((hits & ~teacher).sum()), "teacher alone": int((~hits & teacher).sum())}
        difference = paired_bootstrap(hits.mean(0), teacher.mean(0), ones, groups=groups)
        rows.append(row | dict(zip(("minus teacher", "diff low", "diff high"), difference, strict=True)))
    return rows
