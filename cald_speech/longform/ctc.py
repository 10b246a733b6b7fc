"""Greedy CTC decoding of logits that come in chunks: the text of the whole, whatever the chunks.

The most probable token of each frame, repeats collapsed, blanks dropped (Graves et al., 2006, equation 4). A run of one
token that crosses the border of two chunks is one run.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from cald_speech.longform.words import TokenSpan

LogitChunks = Iterable[tuple[int, Tensor]]


def numbered(parts: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Chunks that follow each other, with the frame that each begins at.

    Example
    -------
    >>> [first for first, _ in numbered([torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(1, 3)])]
    [0, 2, 7]
    """
    first = 0
    for part in parts:
        yield first, part
        first += len(part)


def log_posteriors(chunks: LogitChunks) -> Iterator[tuple[int, Tensor]]:
    """Pairs (first frame, (t, V) float32 log posteriors on the CPU) of logit chunks.

    Raises: ValueError, for chunks that leave frames out or come twice; RuntimeError, for logits that are not finite,
    with the frame.

    Example
    -------
    >>> [(first, p.exp()) for first, p in log_posteriors([(0, torch.zeros(1, 2))])]
    [(0, tensor([[0.5000, 0.5000]]))]
    """
    expected = 0
    for first, logits in chunks:
        if first != expected or logits.dim() != 2:
            raise ValueError(f"expected (t, V) logits from frame {expected} on, got {tuple(logits.shape)} from {first}")
        finite = logits.isfinite().all(-1)
        if not finite.all():
            raise RuntimeError(f"the logits of frame {first + int(finite.long().argmin())} are not finite")
        expected += len(logits)
        yield first, logits.float().log_softmax(-1).cpu()


def greedy(chunks: LogitChunks, blank: int) -> Iterator[TokenSpan]:
    """Decode greedily: the span of each token but the blank, in order, as soon as the run after it has begun.

    Arguments
    ---------
    chunks : pairs (first frame, (t, V) logits), in order and without gaps, of any size.
    blank : the blank's token.

    Raises
    ------
    ValueError, RuntimeError
        as `log_posteriors`.

    Example
    -------
    >>> logits = 20.0 * torch.nn.functional.one_hot(torch.tensor([1, 1, 0, 1, 2])).float()
    >>> for span in greedy([(0, logits[:1]), (1, logits[1:])], blank=0):
    ...     print(span.token, span.first_frame, span.last_frame, round(span.confidence, 3))
    1 0 1 1.0
    1 3 3 1.0
    2 4 4 1.0
    """
    token, start, end, total = blank, 0, 0, 0.0
    for first, log_probs in log_posteriors(chunks):
        best, tokens = log_probs.max(-1)
        borders = [0, *(torch.nonzero(tokens[1:] != tokens[:-1]).flatten() + 1).tolist(), len(tokens)]
        sums = torch.nn.functional.pad(best.exp().double().cumsum(0), (1, 0)).tolist()
        for low, high in pairwise(borders):
            run = int(tokens[low]) if high > low else token
            if run != token:
                if token != blank:
                    yield TokenSpan(token, start, end - 1, total / (end - start))
                token, start, total = run, first + low, 0.0
            end = first + high
            total += sums[high] - sums[low]
    if token != blank:
        yield TokenSpan(token, start, end - 1, total / (end - start))
