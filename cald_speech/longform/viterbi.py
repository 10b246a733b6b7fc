"""The Viterbi passes behind forced alignment: forward with scores alone, back through one block after another.

``b`` and ``l`` are the scores of the file docstring of `alignment`, for a window of labels that moves between blocks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

NEVER = -np.inf


@dataclass(frozen=True)
class Scores:
    """Best paths so far that end in the window of W labels from ``low`` on.

    ``blanks`` (W + 1,) is before each label of the window and after its last; ``labels`` (W + 1,) begins with an entry
    that stays minus infinity, the label before the window. Both float64: sums over days of frames stay exact enough.
    """

    low: int
    blanks: np.ndarray
    labels: np.ndarray

    def best(self) -> int:
        """The label that the best path is in or just before."""
        blank, label = int(self.blanks.argmax()), int(self.labels.argmax())
        return self.low + (blank if self.blanks[blank] >= self.labels[label] else label - 1)


class Trellis:
    """Steps of the recursion for the labels ``y`` (U,), ``width`` of them at a time."""

    def __init__(self, y: np.ndarray, blank: int, width: int):
        self.y, self.blank, self.width = y, blank, width
        self.no_skip = np.zeros(len(y))
        self.no_skip[1:][y[1:] == y[:-1]] = NEVER
        self.no_skip[0] = NEVER

    def start(self) -> Scores:
        """Before the first frame: nothing said yet."""
        blanks = np.full(self.width + 1, NEVER)
        blanks[0] = 0.0
        return Scores(0, blanks, np.full(self.width + 1, NEVER))

    def recentre(self, scores: Scores) -> Scores:
        """Move the window so that the best path is in its middle, if it is beyond; what falls out is forgotten."""
        low = min(max(scores.best() - self.width // 2, scores.low), len(self.y) - self.width)
        shift = low - scores.low
        if shift <= 0:
            return scores
        blanks, labels = (np.full(self.width + 1, NEVER) for _ in range(2))
        blanks[: max(0, self.width + 1 - shift)] = scores.blanks[shift:]
        labels[: max(0, self.width + 1 - shift)] = scores.labels[shift:]
        labels[0] = NEVER
        return Scores(low, blanks, labels)

    def run(self, scores: Scores, log_probs: np.ndarray) -> Scores:
        """The scores after the frames ``log_probs`` (K, V)."""
        for after, *_ in self._steps(scores, log_probs):
            scores = after
        return scores

    def pointers(self, scores: Scores, log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each frame's best paths came from.

        blanks (K, W + 1): 0 from the same blank, 1 from the label before it; labels (K, W): 0 from the same label, 1
        from the blank before it, 2 from the label before that.
        """
        from_label = np.empty((len(log_probs), self.width + 1), dtype=bool)
        source = np.empty((len(log_probs), self.width), dtype=np.uint8)
        for t, (_, before, skip) in enumerate(self._steps(scores, log_probs)):
            np.greater(before.labels, before.blanks, out=from_label[t])
            stay, enter = before.labels[1:], before.blanks[:-1]
            np.greater(enter, stay, out=source[t], casting="unsafe")
            source[t][skip > np.maximum(stay, enter)] = 2
        return from_label, source

    def _steps(self, scores: Scores, log_probs: np.ndarray) -> Iterator[tuple[Scores, Scores, np.ndarray]]:
        """For each frame: scores after it and before it, and each label's score by way of the label before it (W,)."""
        y = self.y[scores.low : scores.low + self.width]
        no_skip = self.no_skip[scores.low : scores.low + self.width]
        for frame in log_probs.astype(np.float64):
            skip = scores.labels[:-1] + no_skip
            blanks = np.maximum(scores.blanks, scores.labels)
            blanks += frame[self.blank]
            labels = np.empty_like(scores.labels)
            labels[0] = NEVER
            inner = labels[1:]
            np.maximum(scores.labels[1:], scores.blanks[:-1], out=inner)
            np.maximum(inner, skip, out=inner)
            inner += frame[y]
            before, scores = scores, Scores(scores.low, blanks, labels)
            yield scores, before, skip


@dataclass(frozen=True)
class Path:
    """For each of U labels its first and last frame and the sum of its posteriors over them."""

    first: np.ndarray
    last: np.ndarray
    posteriors: np.ndarray


def trace_back(trellis: Trellis, blocks: Iterable[tuple[int, Scores, np.ndarray]], in_label: bool) -> Path:
    """The best path, from the end (in the last label, or in the blank after it) to the start.

    blocks: last to first, each with its first frame, the scores before it and its log posteriors (K, V).
    """
    num_labels = len(trellis.y)
    path = Path(np.zeros(num_labels, np.int64), np.full(num_labels, -1), np.zeros(num_labels))
    u = num_labels - 1 if in_label else num_labels
    for first_frame, scores, log_probs in blocks:
        from_label, source = trellis.pointers(scores, log_probs)
        for t in range(len(log_probs) - 1, -1, -1):
            if in_label:
                if path.last[u] < 0:
                    path.last[u] = first_frame + t
                path.first[u] = first_frame + t
                path.posteriors[u] += np.exp(log_probs[t, trellis.y[u]])
                came = source[t, u - scores.low]
                in_label, u = came != 1, u - (came == 2)
            elif from_label[t, u - scores.low]:
                in_label, u = True, u - 1
    return path
