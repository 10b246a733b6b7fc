"""One block of frames of some sequences: what the CPU path of the selective scan computes in its caches.

Everything is laid out (frames, sequences, G, N, D / G): the channels, over which nearly all work is elementwise, come
last, and one frame of all sequences is contiguous, which the recurrence wants.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# exp2 of a rate scaled by this is exp of the rate, at a quarter of its time on a CPU.
LOG2_E = math.log2(math.e)


class Inputs(NamedTuple):
    """A block's inputs in the arithmetic's dtype, zero at padding."""

    x: Tensor  # (frames, rows, G, 1, D / G)
    dt: Tensor  # the same
    B: Tensor  # (frames, rows, G, N, 1)
    C: Tensor  # the same
    padding: Tensor | None  # (frames, rows), True where padded; None where nothing is


class Gradients(NamedTuple):
    """The gradients of a block's inputs, shaped like them, and its addition to that of A (G, N, D / G)."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor


def read_block(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, frames: slice, lengths: Tensor | None, dtype: torch.dtype
) -> Inputs:
    """Frames of x, dt (rows, T, D) and B, C (rows, T, G, N). A frame with dt = 0 and x = 0 leaves the state alone."""
    padding, groups = None, B.size(2)
    if lengths is not None and (lengths.device.type != "cpu" or frames.stop > int(lengths.min())):
        padding = torch.arange(frames.start, frames.stop, device=x.device)[:, None] >= lengths
    x, dt, B, C = (read_frames(v, frames, padding, dtype) for v in (x, dt, B, C))
    x, dt = (v.unflatten(2, (groups, -1)).unsqueeze(3) for v in (x, dt))
    return Inputs(x, dt, B[..., None], C[..., None], padding)


def read_frames(v: Tensor, frames: slice, padding: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(rows, T, ...) to (frames, rows, ...), zero at padding whatever stood there."""
    return zero_padding(v[:, frames].transpose(0, 1).to(dtype), padding).contiguous()


def zero_padding(v: Tensor, padding: Tensor | None) -> Tensor:
    return v if padding is None else v.masked_fill(padding.reshape(*padding.shape, *(1,) * (v.dim() - 2)), 0)


class BlockScan:
    """The scan over one block, forwards and backwards, in scratch that the next block uses again.

    Arguments
    ---------
    A : (G, N, D / G) decay rates, in the arithmetic's dtype.
    rows, max_frames : how large a block can be.
    reverse : True scans from the block's last frame to its first.
    """

    def __init__(self, A: Tensor, rows: int, max_frames: int, reverse: bool):
        self.A, self.reverse = A, reverse
        self.log2_rate = A * LOG2_E
        self.decays = A.new_empty(max_frames, rows, *A.shape)
        # One more than frames: the state before the block is stored at the end at which the scan enters.
        self.states = A.new_empty(max_frames + 1, rows, *A.shape)

    def run(self, inputs: Inputs, entering: Tensor) -> Tensor:
        """Fill ``decays`` and ``states``; returns the states after each frame, (frames, rows, G, N, D / G)."""
        num_frames = inputs.x.size(0)
        torch.mul(inputs.dt, self.log2_rate, out=self.decays[:num_frames]).exp2_()
        before, after = self._before_and_after(num_frames)
        torch.mul(inputs.dt * inputs.x, inputs.B, out=after)
        before[-1 if self.reverse else 0] = entering
        states, decays = self.states[: num_frames + 1].unbind(), self.decays.unbind()
        if self.reverse:
            for t in range(num_frames - 1, -1, -1):
                states[t].addcmul_(decays[t], states[t + 1])
        else:
            for t in range(num_frames):
                states[t + 1].addcmul_(decays[t], states[t])
        return after

    def _before_and_after(self, num_frames: int) -> tuple[Tensor, Tensor]:
        early, late = self.states[:num_frames], self.states[1 : num_frames + 1]
        return (late, early) if self.reverse else (early, late)

    def last(self, num_frames: int) -> Tensor:
        """The state after the block, in the order of the scan."""
        return self.states[0 if self.reverse else num_frames]

    def run_backward(
        self, inputs: Inputs, grad_y: Tensor, carried: Tensor, scratch: Tensor, entering: Tensor
    ) -> Gradients:
        """The gradients of a block whose state on entering was saved.

        grad_y : (frames, rows, G, 1, D / G), zero at padding.
        carried : the gradient of the state after the block; overwritten with that of the state before it.
        scratch : like ``decays``.
        """
        num_frames = inputs.x.size(0)
        after = self.run(inputs, entering)
        before, _ = self._before_and_after(num_frames)
        decays, flowing = self.decays[:num_frames], scratch[:num_frames]
        grad_C = after @ grad_y.transpose(-1, -2)
        # The gradient of the state after each frame: from the frame's output, and from the frame that follows.
        torch.mul(inputs.C, grad_y, out=flowing)
        order = range(num_frames) if self.reverse else range(num_frames - 1, -1, -1)
        flows, rates = flowing.unbind(), decays.unbind()
        flows[order[0]].add_(carried)
        for following, t in pairwise(order):
            flows[t].addcmul_(rates[following], flows[following])
        torch.mul(rates[order[-1]], flows[order[-1]], out=carried)
        grad_weighted = inputs.B.transpose(-1, -2) @ flowing
        grad_B = flowing @ (inputs.dt * inputs.x).transpose(-1, -2)
        # That of dt A, in place: decay times the state before the frame, not a difference, which would cancel.
        through = decays.mul_(before).mul_(flowing)
        grad_dt = torch.mul(through, self.A, out=flowing).sum(-2, keepdim=True).addcmul_(grad_weighted, inputs.x)
        grad_A = through.mul_(inputs.dt).sum((0, 1))
        return Gradients(grad_weighted * inputs.dt, zero_padding(grad_dt, inputs.padding), grad_B, grad_C, grad_A)
