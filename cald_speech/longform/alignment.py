"""Forced alignment: on which frames a known text is spoken, for hours of audio in bounded memory.

Viterbi over CTC's states (Graves et al., 2006, section 4.1): U labels and the U + 1 blanks before, between and after
them. With b_t(u) the best path's log probability that ends in the blank before label u and l_t(u) in label u,

    b_t(u) = log p_t(blank) + max(b_{t-1}(u), l_{t-1}(u - 1))
    l_t(u) = log p_t(y_u)   + max(l_{t-1}(u), b_{t-1}(u), l_{t-1}(u - 1) if y_u != y_{u-1}).

Back-pointers of all frames and states would take 2 T U bytes (18 GB for an hour of speech). Here the forward pass keeps
the scores alone, once in every block of frames; the way back takes the blocks from the last to the first, runs each
forward again from its kept scores, and holds the back-pointers of that block only (checkpointing). Where the text is
longer than ``band`` labels, each block looks at that many labels about the best so far. For T frames, V tokens,
W = min(band, U) labels and blocks of K <= 1,024 frames,

    kept, in memory or in files in ``storage``:  T (4 V + 16 W / K) bytes
    in memory besides:                           K (8 V + 2 W) + 32 U bytes.

With 32 tokens, 50 frames a second and the default band that is 35 MB for each hour, and 9 MB and the text besides. Time
is in proportion to T W: linear in the length.
"""

import errno
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cald_speech.errors import UserError
from cald_speech.longform.ctc import LogitChunks, log_posteriors
from cald_speech.longform.words import TokenSpan, Vocabulary

MOST_FRAMES_A_BLOCK = 1_024  # from one set of kept scores to the next
DEFAULT_BAND = 4_096
NEVER = -np.inf


def align(
    chunks: LogitChunks,
    labels: Sequence[int],
    blank: int,
    *,
    band: int = DEFAULT_BAND,
    storage: str | Path | None = None,
) -> Iterator[TokenSpan]:
    """The frames of each label of a known text on the best path; delimiters are labels like others.

    Equal to the Viterbi path over all states where ``band`` is at least the number of labels. With fewer, the path is
    the best of those that stay within band / 2 labels of the best partial path at each block's start. The default is
    some five minutes of speech.

    Arguments
    ---------
    chunks : pairs (first frame, (t, V) logits), in order and without gaps, of any size.
    labels : the text's tokens, without blanks.
    blank : the blank's token.
    band : labels looked at in any one frame, at least 2.
    storage : a folder for what is kept of all frames (it leaves no file behind); None keeps it in memory.

    Raises
    ------
    UserError
        where the text has more characters than the audio has frames for, no path within the band reaches its end, or
        the disk is full.
    ValueError
        for a label that is the blank or none of the V tokens, or a band below 2.

    Example
    -------
    >>> import torch
    >>> logits = 9.0 * torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 0, 2, 0])).float()
    >>> [(span.token, span.first_frame, span.last_frame) for span in align([(0, logits)], [1, 2], blank=0)]
    [(1, 1, 2), (2, 4, 4)]
    """
    y = np.asarray(labels, dtype=np.int64)
    if band < 2 or (y == blank).any() or (y < 0).any():
        raise ValueError("expected a band of at least 2 labels, and labels that are tokens other than the blank")
    if not len(y):
        return
    with _Scratch(storage) as frames, _Scratch(storage) as kept:
        path = _best_path(chunks, y, blank, band, frames, kept)
    for label, first, last, total in zip(y, path.first, path.last, path.posteriors, strict=True):
        yield TokenSpan(int(label), int(first), int(last), float(total) / (int(last) - int(first) + 1))


def labels_of(text: str, vocabulary: Vocabulary, *, unknown: str = "error") -> tuple[list[int], list[str]]:
    """The tokens of a text, delimiters between its words, and its words.

    A letter that the vocabulary has in the other case alone is taken in that. ``unknown`` says what becomes of
    characters that it has in neither: ``error`` refuses them, ``drop`` leaves them out, and words of nothing else too.

    Raises
    ------
    UserError
        for such characters, naming them and the way out.

    Example
    -------
    >>> vocabulary = Vocabulary(("<pad>", "|", "A", "B"), blank=0, delimiter=1)
    >>> labels_of("Ab, b", vocabulary, unknown="drop")
    ([2, 3, 1, 3], ['Ab,', 'b'])
    """
    spelled, strange = [], set()
    for word in text.split():
        tokens, unwritten = vocabulary.spell(word, any_case=True)
        strange |= set(unwritten)
        if tokens:
            spelled.append((word, tokens))
    if strange and unknown != "drop":
        raise UserError(
            f"the text has characters that the model does not write: {' '.join(map(repr, sorted(strange)[:20]))}. "
            "Spell numbers and signs out, or leave such characters out of the alignment with unknown='drop' (--unknown "
            "drop)"
        )
    between = [] if vocabulary.delimiter is None else [vocabulary.delimiter]
    labels = [token for _, tokens in spelled for token in (*tokens, *between)]
    return labels[: len(labels) - len(between)], [word for word, _ in spelled]


class _Scratch:
    """Bytes kept in memory, or in a file without a name that is gone when it is closed, however the program ends."""

    def __init__(self, folder: str | Path | None):
        self.folder = folder
        try:
            self.file = io.BytesIO() if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"storage: expected a folder that can be written, got {folder} ({error})") from error

    def __enter__(self) -> "_Scratch":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def append(self, array: np.ndarray) -> None:
        try:
            self.file.write(np.ascontiguousarray(array).data)
            self.file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{self.folder}: the disk is full after {self.file.tell() / 2**20:.0f} MiB of the alignment's scores. "
                "They need some 40 MB for each hour of audio: make room, or choose another folder (--storage)"
            ) from error

    def read(self, start: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        self.file.seek(start)
        return np.frombuffer(self.file.read(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def _best_path(
    chunks: LogitChunks, y: np.ndarray, blank: int, band: int, frames: _Scratch, kept: _Scratch
) -> "BestPath":
    num_frames, num_tokens = 0, 0
    for _, log_probs in log_posteriors(chunks):
        frames.append(log_probs.numpy())
        num_frames, num_tokens = num_frames + len(log_probs), log_probs.size(1)
    if num_frames and y.max() >= num_tokens:
        raise ValueError(f"labels: expected tokens below {num_tokens}, got {y.max()}")
    needed = len(y) + int((y[1:] == y[:-1]).sum())
    if needed > num_frames:
        raise UserError(
            f"the text needs at least {needed} frames ({len(y)} characters, and a blank between equal ones), but the "
            f"audio has {num_frames}: expected the text of this audio"
        )
    block = min(MOST_FRAMES_A_BLOCK, band // 2)
    starts = range(0, num_frames, block)
    trellis = Trellis(y, blank, min(band, len(y)))
    lows: list[int] = []

    def frames_from(start: int) -> np.ndarray:
        size = (min(block, num_frames - start), num_tokens)
        return frames.read(4 * start * num_tokens, size, np.float32)

    def backwards() -> Iterator[tuple[int, Scores, np.ndarray]]:
        size = trellis.width + 1
        for place in reversed(range(len(starts))):
            blanks, labels = kept.read(16 * place * size, (2, size), np.float64)
            yield starts[place], Scores(lows[place], blanks, labels), frames_from(starts[place])

    scores = trellis.start()
    for start in starts:
        scores = trellis.recentre(scores)
        lows.append(scores.low)
        kept.append(np.stack([scores.blanks, scores.labels]))
        scores = trellis.run(scores, frames_from(start))
    in_label = bool(scores.labels[-1] > scores.blanks[-1])
    if scores.low + trellis.width < len(y) or not np.isfinite(max(scores.labels[-1], scores.blanks[-1])):
        raise UserError(
            f"no path within a band of {band} characters reaches the end of the text: it stands at character "
            f"{scores.best()} of {len(y)}. Expected the text of this audio from beginning to end; where it is, give a "
            "wider band"
        )
    return trace_back(trellis, backwards(), in_label)


@dataclass(frozen=True)
class Scores:
    """Best paths so far that end in the window of W labels from ``low`` on; the window moves between blocks.

    ``blanks`` (W + 1,), b of the file's docstring, is before each label of the window and after its last; ``labels``
    (W + 1,), l of it, begins with an entry that stays minus infinity, the label before the window. Both float64: sums
    over days of frames stay exact enough.
    """

    low: int
    blanks: np.ndarray
    labels: np.ndarray

    def best(self) -> int:
        """The label that the best path is in or just before."""
        blank, label = int(self.blanks.argmax()), int(self.labels.argmax())
        return self.low + (blank if self.blanks[blank] >= self.labels[label] else label - 1)


class Trellis:
    """Steps of the recursion for the labels ``y`` (U,), ``width`` of them at a time.

    ``run`` is the forward pass with scores alone, ``pointers`` the same over one block with its back-pointers.
    """

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
class BestPath:
    """For each of U labels its first and last frame and the sum of its posteriors over them."""

    first: np.ndarray
    last: np.ndarray
    posteriors: np.ndarray


def trace_back(trellis: Trellis, blocks: Iterable[tuple[int, Scores, np.ndarray]], in_label: bool) -> BestPath:
    """The best path, from the end (in the last label, or in the blank after it) to the start.

    blocks: last to first, each with its first frame, the scores before it and its log posteriors (K, V).
    """
    num_labels = len(trellis.y)
    path = BestPath(np.zeros(num_labels, np.int64), np.full(num_labels, -1), np.zeros(num_labels))
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
