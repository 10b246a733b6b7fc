"""CTC decoding of logits that come in chunks: the text of the whole, whatever the chunks.

Greedy: the most probable token of each frame, repeats collapsed, blanks dropped (Graves et al., 2006, equation 4). A
run of one token that crosses the border of two chunks is one run.

Prefix beam search, in bounded memory. The probability of a text is the sum over all paths that collapse to it (equation
3). For each text so far (a prefix) two sums are carried from frame to frame (Hannun et al., 2014, arXiv 1408.2873):
paths that end in a blank and paths that end in its last token. Beside them goes the best single path of each kind: when
each token came. Tokens that all prefixes share are given out and forgotten. That alone bounds nothing: CTC scores its
frames apart, so two spellings of a place go on with the same futures, and both stay in the beam until there are closer
rivals. So every ``SETTLE_FRAMES`` frames, counted from the start, what lies more than ``memory_frames`` back is settled
as the best prefix has it, and prefixes that differ there leave the beam.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf, log1p
from typing import NamedTuple

import torch
from torch import Tensor

from cald_speech.errors import UserError
from cald_speech.longform.words import TokenSpan

LogitChunks = Iterable[tuple[int, Tensor]]
Prefix = tuple[int, ...]

SETTLE_FRAMES = 50


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


class NotFinite(UserError, RuntimeError):
    """Logits that a model has no numbers for: its weights, or what it was given, are too large for its dtype."""


def log_posteriors(chunks: LogitChunks) -> Iterator[tuple[int, Tensor]]:
    """Pairs (first frame, (t, V) float32 log posteriors on the CPU) of logit chunks.

    Raises
    ------
    ValueError
        for chunks that leave frames out or come twice.
    NotFinite
        for logits that are not finite, with the frame.

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
            raise NotFinite(
                f"the logits of frame {first + int(finite.long().argmin())} are not finite: expected numbers, got NaN "
                "or infinity. Read in float32, or take an earlier checkpoint of the model"
            )
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
        as :func:`log_posteriors`.

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


class Path(NamedTuple):
    """The last token of a path with its frames so far and the sum of its posteriors over them; the tokens before it."""

    before: "Path | None"
    token: int
    first: int
    last: int
    posteriors: float


@dataclass(slots=True)
class Beam:
    """Log sums over the paths of one prefix that end in a blank and in its last token, and the best single paths."""

    blank: float = -inf
    token: float = -inf
    best_blank: float = -inf
    best_token: float = -inf
    path_blank: Path | None = None
    path_token: Path | None = None

    def total(self) -> float:
        return _log_add(self.blank, self.token)

    def best(self) -> tuple[float, Path | None]:
        """The better of the two single paths."""
        if self.best_blank >= self.best_token:
            return self.best_blank, self.path_blank
        return self.best_token, self.path_token


def beam_search(
    chunks: LogitChunks,
    blank: int,
    *,
    beam_width: int = 16,
    token_prune_logp: float = -7.0,
    beam_prune_logp: float = -12.0,
    memory_frames: int = 500,
) -> Iterator[TokenSpan]:
    """Decode by prefix beam search: the token spans of the most probable text, as far as they are settled.

    Arguments
    ---------
    chunks : pairs (first frame, (t, V) logits), in order and without gaps; their sizes do not change the result.
    blank : the blank's token.
    beam_width : prefixes kept after each frame.
    token_prune_logp : tokens with a log posterior below it extend no prefix in that frame; minus infinity for none.
    beam_prune_logp : prefixes so far below the best one are dropped; minus infinity for none.
    memory_frames : how far back prefixes may differ; the default is 10 s.

    Returns
    -------
    Spans on the frames of the text's best path, with the mean posterior of the token over its frames. Without pruning,
    and with a beam that holds all prefixes, the text is the most probable one there is.

    Raises
    ------
    UserError
        for a beam of less than one prefix.
    ValueError, RuntimeError
        as :func:`log_posteriors`.

    Example
    -------
    >>> import torch
    >>> logits = torch.tensor([[0.55, 0.45], [0.55, 0.45]]).log()
    >>> [span.token for span in beam_search([(0, logits)], blank=0)]  # 1 by way of three paths; greedy says nothing
    [1]
    """
    if beam_width < 1:
        raise UserError(f"expected a beam of at least 1 prefix, got {beam_width}: 16 is a usual size")
    beams: dict[Prefix, Beam] = {(): Beam(blank=0.0, best_blank=0.0)}
    for first, log_probs in log_posteriors(chunks):
        for frame, (tokens, values) in enumerate(_candidates(log_probs, blank, token_prune_logp), start=first):
            beams = _prune(_step(beams, frame, blank, tokens, values), beam_width, beam_prune_logp)
            if (frame + 1) % SETTLE_FRAMES == 0:
                beams, settled = _settle(beams, frame - memory_frames)
                yield from settled
    yield from _spans(_winner(beams)[1].best()[1])


def _candidates(log_probs: Tensor, blank: int, least: float) -> Iterator[tuple[list[int], list[float]]]:
    """For each frame the tokens that are looked at, and their log posteriors; the blank always comes first."""
    kept = log_probs >= least
    kept[:, blank] = False
    for row, keep in zip(log_probs, kept, strict=True):
        tokens = keep.nonzero().flatten()
        yield [blank, *tokens.tolist()], [row[blank].item(), *row[tokens].tolist()]


def _step(
    beams: dict[Prefix, Beam], frame: int, blank: int, tokens: list[int], values: list[float]
) -> dict[Prefix, Beam]:
    after: dict[Prefix, Beam] = {}
    for prefix, beam in beams.items():
        total, (best, path) = beam.total(), beam.best()
        stays = after.setdefault(prefix, Beam())
        stays.blank = total + values[0]
        stays.best_blank, stays.path_blank = best + values[0], path
        for token, value in zip(tokens[1:], values[1:], strict=True):
            mass, score, before = total, best, path
            if prefix and token == prefix[-1]:
                # without a blank between them, two equal tokens are one
                _lengthen(stays, beam, frame, value)
                mass, score, before = beam.blank, beam.best_blank, beam.path_blank
            if mass > -inf:
                longer = after.setdefault((*prefix, token), Beam())
                longer.token = _log_add(longer.token, mass + value)
                if score + value > longer.best_token:
                    longer.best_token = score + value
                    longer.path_token = Path(before, token, frame, frame, exp(value))
    return after


def _lengthen(stays: Beam, beam: Beam, frame: int, value: float) -> None:
    """The last token goes on for one more frame."""
    stays.token = _log_add(stays.token, beam.token + value)
    if beam.path_token is not None and beam.best_token + value > stays.best_token:
        last = beam.path_token
        stays.best_token = beam.best_token + value
        stays.path_token = last._replace(last=frame, posteriors=last.posteriors + exp(value))


def _prune(beams: dict[Prefix, Beam], beam_width: int, beam_prune_logp: float) -> dict[Prefix, Beam]:
    ranked = sorted(((beam.total(), prefix) for prefix, beam in beams.items()), reverse=True)
    least = ranked[0][0] + beam_prune_logp
    return {prefix: beams[prefix] for total, prefix in ranked[:beam_width] if total >= least}


def _settle(beams: dict[Prefix, Beam], horizon: int) -> tuple[dict[Prefix, Beam], list[TokenSpan]]:
    """Drop what contradicts the best prefix at or before frame ``horizon``; take off what all then share."""
    winner, best = _winner(beams)
    spans = _spans(best.best()[1])
    old = winner[: sum(span.last_frame <= horizon for span in spans)]
    beams = {prefix: beam for prefix, beam in beams.items() if prefix[: len(old)] == old}
    # The last token of each stays: the next frame may lengthen it.
    shared, longest = 0, min(len(prefix) for prefix in beams) - 1
    while shared < longest and all(prefix[shared] == winner[shared] for prefix in beams):
        shared += 1
    if shared < 1:
        return beams, []
    for beam in beams.values():
        beam.path_blank, beam.path_token = _without(beam.path_blank, shared), _without(beam.path_token, shared)
    return {prefix[shared:]: beam for prefix, beam in beams.items()}, spans[:shared]


def _winner(beams: dict[Prefix, Beam]) -> tuple[Prefix, Beam]:
    return max(beams.items(), key=lambda item: item[1].total())


def _links(path: Path | None) -> list[Path]:
    links = []
    while path is not None:
        links.append(path)
        path = path.before
    return links[::-1]


def _spans(path: Path | None) -> list[TokenSpan]:
    return [TokenSpan(p.token, p.first, p.last, p.posteriors / (p.last - p.first + 1)) for p in _links(path)]


def _without(path: Path | None, count: int) -> Path | None:
    """The path without its first ``count`` tokens."""
    shortened = None
    for link in _links(path)[count:]:
        shortened = link._replace(before=shortened)
    return shortened


def _log_add(a: float, b: float) -> float:
    high, low = (a, b) if a >= b else (b, a)
    return high if low == -inf else high + log1p(exp(low - high))
