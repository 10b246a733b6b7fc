"""The steps that the chunked SSD's forward pass takes on one block, and its backward pass takes again."""

from typing import NamedTuple

import torch
from torch import Tensor

from cald_speech.ops.ssd.torch_blocks import Block, Decays, Scratch, Sequence, Triangles


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
