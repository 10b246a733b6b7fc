"""What the chunked SSD's forward and backward passes share: blocks of chunks, exact decays, layouts, a block's steps.

A *block* is a run of whole chunks that fits a CPU's caches together with its scratch. Within a block tensors are kept
group by group, (G, chunks, Q, ...) with Q frames a chunk: the R = H / G heads of a group share one wide product.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FRAMES_IN_CACHE = 512  # of a block
# The fastest on AVX-512 cores at head and state sizes of 64 to 128: cald-speech benchmark ops.
CHUNK_SIZE = 32
# 2^-150 is 0 in float32: a stronger decay is no different, and 64 of them still sum to an exact multiple of 1/1024.
STRONGEST_LOG_DECAY = -150.0
_COARSE = 1024.0
_LOG2_E = 1.4426950408889634  # powers of 2 throughout: torch's exp2 takes a quarter of exp's time on a CPU


class Block(NamedTuple):
    """``chunks`` chunks of ``size`` frames from frame ``start`` on."""

    start: int
    chunks: int
    size: int

    def of(self, v: Tensor, groups: int) -> Tensor:
        """Frames of one sequence (T, H, ...), any strides, to a view (G, chunks, Q, R, ...)."""
        frames = v[self.start : self.start + self.chunks * self.size]
        return frames.unflatten(0, (self.chunks, self.size)).unflatten(2, (groups, -1)).movedim(2, 0)


def blocks(num_frames: int, chunk_size: int, *, reverse: bool) -> list[Block]:
    """The blocks of one sequence in the order of the scan; what is left over is one short chunk of its own.

    Example
    -------
    >>> blocks(1100, 32, reverse=False)
    [Block(start=0, chunks=16, size=32), Block(start=512, chunks=16, size=32), Block(start=1024, chunks=2, size=32), \
Block(start=1088, chunks=1, size=12)]
    """
    per_block = max(1, FRAMES_IN_CACHE // chunk_size)
    num_chunks, left_over = divmod(num_frames, chunk_size)
    found = [
        Block(first * chunk_size, min(per_block, num_chunks - first), chunk_size)
        for first in range(0, num_chunks, per_block)
    ]
    if left_over:
        found.append(Block(num_frames - left_over, 1, left_over))
    return found[::-1] if reverse else found


class Triangles(NamedTuple):
    """Who comes before whom in a chunk, in the order of the scan; row and column are frames, (Q, Q)."""

    forbidden: Tensor  # 0 where the column is at or before the row, else -inf
    at_or_after: Tensor  # 1 where the column is at or after the row
    before: Tensor  # 1 where the column is before the row

    @classmethod
    def make(cls, size: int, reverse: bool, like: Tensor) -> "Triangles":
        ones = like.new_ones(size, size)
        if reverse:
            return cls(like.new_full((size, size), -torch.inf).tril(-1), ones.tril(), ones.triu(1))
        return cls(like.new_full((size, size), -torch.inf).triu(1), ones.triu(), ones.tril(-1))


class Decays(NamedTuple):
    """Decays of one block, each (G, chunks, Q, R) unless said; ``cum`` sums dt A log2(e) along the scan.

    A float32 difference of two running sums loses up to 2e-5 of the decay. So each sum is split, in float64, into a
    multiple of 1/1024, whose differences are exact in float32, and a rest in (-1/1024, 0], which goes into row and
    column factors: 2^(cum_i - cum_j) = fine_i 2^(coarse_i - coarse_j) / fine_j, and no power has a positive exponent.
    """

    coarse: Tensor
    fine: Tensor
    inverse_fine: Tensor
    into: Tensor  # from the state before the chunk to each frame: 2^cum
    out: Tensor  # from each frame to the state after the chunk: 2^(total - cum)
    through: Tensor  # (G, chunks, 1, R), from the state before the chunk to the state after it

    @classmethod
    def of(cls, dt: Tensor, A: Tensor, *, reverse: bool, dtype: torch.dtype) -> "Decays":
        """dt (G, chunks, Q, R) and A (G, 1, 1, R)."""
        log_decay = (dt.double() * (A.double() * _LOG2_E)).clamp_(min=STRONGEST_LOG_DECAY)
        cum = log_decay.flip(2).cumsum(2).flip(2) if reverse else log_decay.cumsum(2)
        total = cum[:, :, :1] if reverse else cum[:, :, -1:]
        coarse = cum if dtype == torch.float64 else (cum * _COARSE).ceil_().div_(_COARSE)
        fine = (cum - coarse).exp2_()
        factors = (coarse, fine, 1 / fine, cum.exp2(), (total - cum).exp2_(), total.exp2())
        return cls(*(factor.to(dtype) for factor in factors))


class Scratch:
    """Tensors that are used again by every block of one call: a new one for each would cost its page faults."""

    def __init__(self, like: Tensor):
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = 1
        for n in shape:
            size *= n
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)


class Sequence(NamedTuple):
    """One sequence's valid frames, its tensors without the batch axis: x (T, H, P), dt (T, H), B and C (T, G, N)."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor

    @classmethod
    def each(cls, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, lengths: Tensor | None) -> Iterator["Sequence"]:
        """The sequences of a batch, cut to their lengths: padding is never touched."""
        valid = [x.size(1)] * x.size(0) if lengths is None else lengths.tolist()
        for b, length in enumerate(valid):
            yield cls(*(v[b, :length] for v in (x, dt, B, C)))


def to_layout(state: Tensor, groups: int) -> Tensor:
    """A sequence's state (H, P, N) to (G, N, R * P), as the wide products want it."""
    return state.unflatten(0, (groups, -1)).permute(0, 3, 1, 2).flatten(2)


def from_layout(state: Tensor, head_dim: int) -> Tensor:
    """The way back, (G, N, R * P) to (H, P, N)."""
    return state.unflatten(2, (-1, head_dim)).permute(0, 2, 3, 1).flatten(0, 1)


class Inputs(NamedTuple):
    """One block in the arithmetic's dtype: x (G, chunks, Q, R, P), dt (G, chunks, Q, R), B and C (G * chunks, Q, N)."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    decays: Decays


def prepare(block: Block, sequence: Sequence, A: Tensor, scratch: Scratch, reverse: bool) -> Inputs:
    groups, dtype = sequence.B.size(1), scratch.like.dtype
    dt = block.of(sequence.dt, groups)
    decays = Decays.of(dt, A.view(groups, 1, 1, -1), reverse=reverse, dtype=dtype)
    B, C = (block.of(v, groups).squeeze(3).flatten(0, 1).to(dtype) for v in (sequence.B, sequence.C))
    return Inputs(in_dtype(block.of(sequence.x, groups), scratch, "x"), dt.to(dtype), B, C, decays)


def in_dtype(v: Tensor, scratch: Scratch, name: str) -> Tensor:
    """``v`` itself, or its copy in the arithmetic's dtype."""
    return v if v.dtype == scratch.like.dtype else scratch(name, *v.shape).copy_(v)


def carry_states(inputs: Inputs, state: Tensor, scratch: Scratch, reverse: bool) -> Tensor:
    """Move ``state`` (G, N, R * P) over the block in place; returns it before each chunk, (G, chunks, N, R * P)."""
    x, dt, B, _, decays = inputs
    groups, chunks, size = x.shape[:3]
    weighted = scratch("weighted", *x.shape)
    torch.mul(x, (dt * decays.out)[..., None], out=weighted)
    added = scratch("added", groups * chunks, *state.shape[1:])
    torch.bmm(B.transpose(1, 2), weighted.view(groups * chunks, size, -1), out=added)
    return _recurrence(
        state, added.view(groups, chunks, *state.shape[1:]), decays.through, scratch("entering", *added.shape), reverse
    )


def carry_gradients(inputs: Inputs, received: Tensor, gradient: Tensor, scratch: Scratch, reverse: bool) -> Tensor:
    """The same for the gradient of the state, from the scan's end to its beginning.

    received : (G, chunks, Q, R, P), the frames' gradients, decayed to the state before their chunk.
    Returns the gradient of the state after each chunk.
    """
    groups, chunks, size = received.shape[:3]
    added = scratch("added", groups * chunks, *gradient.shape[1:])
    torch.bmm(inputs.C.transpose(1, 2), received.view(groups * chunks, size, -1), out=added)
    added = added.view(groups, chunks, *gradient.shape[1:])
    return _recurrence(gradient, added, inputs.decays.through, scratch("leaving", *added.shape), not reverse)


def _recurrence(state: Tensor, added: Tensor, through: Tensor, kept: Tensor, reverse: bool) -> Tensor:
    """``state`` before each chunk into ``kept``, one multiply-add for each."""
    groups, chunks, d_state, width = added.shape
    heads = through.size(3)
    kept = kept.view(added.shape)
    per_head = (groups, d_state, heads, width // heads)
    through = through[..., None]  # (G, chunks, 1, R, 1)
    order = range(chunks - 1, -1, -1) if reverse else range(chunks)
    kept[:, order[0]] = state
    for c, following in zip(order, [*order[1:], None], strict=True):
        after = state if following is None else kept[:, following]
        torch.addcmul(added[:, c].view(per_head), kept[:, c].view(per_head), through[:, c], out=after.view(per_head))
    return kept


def attention_weights(coarse: Tensor, triangles: Triangles, weights: Tensor) -> Tensor:
    """2^(coarse_i - coarse_j) <= 1 for frames j at or before i, else 0, into ``weights`` (G, chunks, R, Q, Q)."""
    coarse = coarse.transpose(2, 3)
    torch.sub(coarse[..., :, None], coarse[..., None, :], out=weights)
    return weights.add_(triangles.forbidden).exp2_()
