"""The selective scan in blocks of frames that stay in a CPU's caches, with a backward pass by recomputation.

The decays differ in every entry of every state, so no matrix product does the work as in Mamba-2. What is left is to
touch memory once: a block's decays and states live in scratch that the next block uses again, and nothing of size
(T, D, N) exists. The backward pass runs the blocks in opposite order from the states saved before each.

Within a block everything is laid out (frames, sequences, G, N, D / G): the channels, over which nearly all work is
elementwise, come last, and one frame of all sequences is contiguous, which the recurrence wants.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp2 of a rate scaled by this is exp of the rate, at a quarter of its time on a CPU.
LOG2_E = math.log2(math.e)
# Entries of one scratch tensor, 3 MiB in float32: two or three of them fit the last cache beside the inputs.
BLOCK_ELEMENTS = 3 * 2**18
# Sequences are taken together until one frame of their states has so many entries: below, calls cost more than work.
FRAME_ELEMENTS = 2**15
# The backward pass needs one saved state for each block: shorter blocks would make those larger than the inputs.
MIN_BLOCK_FRAMES = 16


def selective_scan_torch(x, dt, A, B, C, D, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.selective_scan`, which documents arguments and result."""
    tensors = (x, dt, A, B, C, D, initial_state)
    plan = Plan.of(x, A, B.size(2), lengths, reverse, chunk_size)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        y, state = SelectiveScan.apply(plan, *tensors)
    else:
        y, state, _ = run_forward(plan, *tensors, save=False)
    return (y, state) if return_final_state else y


class Plan(NamedTuple):
    """How a call is cut up."""

    lengths: Tensor | None
    reverse: bool
    dtype: torch.dtype  # of the arithmetic
    shape: tuple[int, int, int, int, int]  # B, T, G, N, D / G
    num_rows: int  # sequences at a time
    num_frames: int  # of a block, at most

    @classmethod
    def of(
        cls, x: Tensor, A: Tensor, groups: int, lengths: Tensor | None, reverse: bool, chunk_size: int | None
    ) -> "Plan":
        batch, num_frames, channels = x.shape
        rows = max(1, min(batch, FRAME_ELEMENTS // A.numel()))
        frames = max(MIN_BLOCK_FRAMES, BLOCK_ELEMENTS // (rows * A.numel()))
        frames = max(1, min(chunk_size or frames, frames, num_frames))
        shape = (batch, num_frames, groups, A.size(1), channels // groups)
        return cls(lengths, reverse, torch.promote_types(x.dtype, torch.float32), shape, rows, frames)

    def rows(self) -> Iterator[slice]:
        batch = self.shape[0]
        return (slice(start, min(start + self.num_rows, batch)) for start in range(0, batch, self.num_rows))

    def new_scan(self, rates: Tensor, rows: slice) -> "BlockScan":
        return BlockScan(rates, rows.stop - rows.start, self.num_frames, self.reverse)

    def lengths_of(self, rows: slice) -> Tensor | None:
        return None if self.lengths is None else self.lengths[rows]

    def end_of(self, rows: slice) -> int:
        """Where the longest of some sequences ends."""
        if self.lengths is None or self.lengths.device.type != "cpu":
            return self.shape[1]
        return int(self.lengths[rows].max())

    def blocks_of(self, rows: slice) -> list[slice]:
        """The blocks of some sequences in the order of the scan."""
        end = self.end_of(rows)
        blocks = [slice(start, min(start + self.num_frames, end)) for start in range(0, end, self.num_frames)]
        return blocks[::-1] if self.reverse else blocks

    def states_of(self, v: Tensor) -> Tensor:
        """(..., D, N) to (..., G, N, D / G), a copy in the arithmetic's dtype."""
        groups = self.shape[2]
        return (
            v.to(self.dtype).unflatten(-2, (groups, -1)).transpose(-1, -2).clone(memory_format=torch.contiguous_format)
        )


class SelectiveScan(torch.autograd.Function):
    """The scan with its backward pass by recomputation; saves the inputs and one state for each block."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state, saved = run_forward(plan, *tensors, save=True)
        ctx.plan, ctx.num_inputs = plan, len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: under non-reentrant gradient checkpointing a second reading is refused.
        every = ctx.saved_tensors
        tensors, saved = every[: ctx.num_inputs], every[ctx.num_inputs :]
        return None, *run_backward(ctx.plan, tensors, saved, grad_y, grad_state)


def run_forward(
    plan: Plan,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    *,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the final state and, for each group of rows if ``save``, the states before each of its blocks."""
    batch, groups = x.size(0), plan.shape[2]
    rates, y, saved = plan.states_of(A), x.new_empty(x.shape), []
    state = rates.new_zeros(batch, *rates.shape) if initial_state is None else plan.states_of(initial_state)
    direct = None if D is None else D.to(plan.dtype).view(groups, 1, -1)
    for rows in plan.rows():
        scan, lengths, blocks = plan.new_scan(rates, rows), plan.lengths_of(rows), plan.blocks_of(rows)
        if save:
            saved.append(rates.new_empty(len(blocks), *state[rows].shape))
        for number, frames in enumerate(blocks):
            if save:
                saved[-1][number] = state[rows]
            inputs = read_block(x[rows], dt[rows], B[rows], C[rows], frames, lengths, plan.dtype)
            outputs = inputs.C.transpose(-1, -2) @ scan.run(inputs, state[rows])
            if direct is not None:
                outputs.addcmul_(inputs.x, direct)
            y[rows, frames] = zero_padding(outputs, inputs.padding).flatten(2).transpose(0, 1)
            state[rows] = scan.last(outputs.size(0))
        y[rows, plan.end_of(rows) :] = 0
    return y, state.transpose(-1, -2).flatten(1, 2), saved


def run_backward(
    plan: Plan, tensors: tuple[Tensor | None, ...], saved: tuple[Tensor, ...], grad_y: Tensor, grad_state: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of x, dt, A, B, C, D and the initial state."""
    x, dt, A, B, C, D, initial_state = tensors
    rates, carried = plan.states_of(A), plan.states_of(grad_state)
    grads = [v.new_empty(v.shape) for v in (x, dt, B, C)]
    grad_A = torch.zeros_like(rates)
    grad_D = rates.new_zeros(rates.size(0), 1, rates.size(2))
    direct = torch.zeros_like(grad_D) if D is None else D.to(plan.dtype).view_as(grad_D)
    for rows, entering in zip(plan.rows(), saved, strict=True):
        scan, lengths, blocks = plan.new_scan(rates, rows), plan.lengths_of(rows), plan.blocks_of(rows)
        scratch = torch.empty_like(scan.decays)
        for frames, state in zip(reversed(blocks), entering.flip(0), strict=True):
            inputs = read_block(x[rows], dt[rows], B[rows], C[rows], frames, lengths, plan.dtype)
            dy = read_frames(grad_y[rows], frames, inputs.padding, plan.dtype).view_as(inputs.x)
            block = scan.run_backward(inputs, dy, carried[rows], scratch, state)
            block.x.addcmul_(dy, direct)
            grad_D += (dy * inputs.x).sum((0, 1))
            grad_A += block.A
            for grad, part in zip(grads, (block.x, block.dt, block.B, block.C), strict=True):
                grad[rows, frames] = part.flatten(2).transpose(0, 1).reshape(grad[rows, frames].shape)
        for grad in grads:
            grad[rows, plan.end_of(rows) :] = 0
    grad_x, grad_dt, grad_B, grad_C = grads
    grad_A = grad_A.transpose(-1, -2).reshape(A.shape).to(A.dtype)
    grad_D = None if D is None else grad_D.view_as(D).to(D.dtype)
    grad_state = carried.transpose(-1, -2).flatten(1, 2).to(initial_state.dtype) if initial_state is not None else None
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_state


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
