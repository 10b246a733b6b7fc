"""How far an error rate could lie from what one test set shows: percentile bootstrap over utterances or speakers.

Utterances (or groups of them) are drawn with replacement, and the rate is the summed errors over the summed words of
the draw. Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DRAWS_AT_ONCE = 2**20  # 8 MiB of int64 places in each chunk


def bootstrap_interval(
    errors: ArrayLike,
    counts: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """The confidence interval (low, high), in percent, of 100 * sum(errors) / sum(counts).

    Draws without any reference word have no rate and are left out.

    Arguments
    ---------
    errors, counts : (U,) edits and reference words (or characters) of each utterance.
    groups : (U,) the speaker, clip or chapter of each utterance; whole groups are then drawn, since what one speaker
        says is not independent. Few groups (below some 20) give an interval that is too narrow.

    Raises
    ------
    ValueError
        for unequal lengths, for fewer than two utterances or groups, or no reference word at all.

    Example
    -------
    >>> bootstrap_interval([1, 0, 2, 1], [10, 10, 10, 10], resamples=1000)
    (2.5, 17.5)
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"expected 0 < level < 1 and resamples >= 1, got {level} and {resamples}")
    sums = _grouped(np.asarray(errors), np.asarray(counts), groups)
    num_groups, total = sums.shape[1], sums[1].sum()
    if num_groups < 2 or total <= 0:
        raise ValueError(f"an interval needs two utterances (or groups) and one word, got {num_groups} and {total}")
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // num_groups)
    chunks = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(num_groups, size=(min(rows, resamples - start), num_groups))
        chunks.append([values[drawn].sum(axis=1) for values in sums])
    drawn_errors, drawn_counts = np.concatenate(chunks, axis=1)
    spoken = drawn_counts > 0
    tail = (1 - level) / 2
    low, high = np.quantile(100 * drawn_errors[spoken] / drawn_counts[spoken], [tail, 1 - tail])
    return float(low), float(high)


def paired_bootstrap(
    errors_a: ArrayLike,
    errors_b: ArrayLike,
    counts: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float, float]:
    """(difference, low, high), in percentage points, of rate A minus rate B on the same utterances.

    Positive: A makes more errors. Where [low, high] includes 0 the two are not told apart. The arguments and the
    errors raised are those of `bootstrap_interval`; each draw takes the same utterances for both, so what makes an
    utterance hard cancels.

    Example
    -------
    >>> paired_bootstrap([1, 0, 2, 1], [1, 0, 2, 1], [10, 10, 10, 10], resamples=1000)
    (0.0, 0.0, 0.0)
    """
    errors_a, errors_b, counts = np.asarray(errors_a), np.asarray(errors_b), np.asarray(counts)
    if errors_a.shape != errors_b.shape:
        raise ValueError(f"expected the same utterances for both, got {errors_a.shape} and {errors_b.shape} errors")
    # Both rates have the same denominator, so their difference is the rate of the differences.
    difference = errors_a - errors_b
    low, high = bootstrap_interval(difference, counts, level=level, resamples=resamples, seed=seed, groups=groups)
    return float(100 * difference.sum() / counts.sum()), low, high


def _grouped(errors: NDArray, counts: NDArray, groups: Sequence[Hashable] | None) -> NDArray:
    """(2, G): errors and counts summed over each group, in the order in which the groups first occur."""
    if errors.ndim != 1 or errors.shape != counts.shape:
        raise ValueError(f"expected errors and counts of one shape (U,), got {errors.shape} and {counts.shape}")
    if groups is None:
        return np.stack([errors, counts])
    if len(groups) != len(errors):
        raise ValueError(f"groups: expected one for each of the {len(errors)} utterances, got {len(groups)}")
    place: dict[Hashable, int] = {}
    places = np.array([place.setdefault(group, len(place)) for group in groups], dtype=np.int64)
    sums = np.zeros((2, len(place)), dtype=np.result_type(errors, counts))
    np.add.at(sums, (slice(None), places), np.stack([errors, counts]))
    return sums
