"""Causal depthwise convolution in blocks of frames that stay in a CPU's caches, with its own backward pass.

In the order of time, frame i of one sequence is ``act(bias + sum_k taps_k e_{i+k})``, where ``e`` are the sequence's n
valid frames with the K-1 frames of history that the scan saw before: in front of them, or behind them in reverse, the
taps then in opposite order. A block copies its part of ``e`` into scratch, where K shifted multiply-adds are cheap;
nothing of the sequence's length is made but the output and, backwards, the gradients.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Entries of one scratch tensor for each thread, 512 KiB in float32: half of a core's second-level cache, where the
# multiply-adds run.
BLOCK_ELEMENTS = 2**17


def short_conv_torch(x, weight, bias, *, lengths, reverse, initial_state, return_final_state, activation):
    """:func:`cald_speech.ops.short_conv`, which documents arguments and result."""
    tensors = (x, weight, bias, initial_state)
    plan = Plan.of(x, lengths, reverse, silu=activation == "silu")
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        y, state = ShortConv.apply(plan, *tensors)
    else:
        y, state = run_forward(plan, *tensors)
    return (y, state) if return_final_state else y


class Plan(NamedTuple):
    """How a call is cut up."""

    ends: list[int]  # valid frames of each sequence
    reverse: bool
    silu: bool
    dtype: torch.dtype  # of the arithmetic
    block: int  # frames of a block

    @classmethod
    def of(cls, x: Tensor, lengths: Tensor | None, reverse: bool, silu: bool) -> "Plan":
        batch, num_frames, channels = x.shape
        ends = [num_frames] * batch if lengths is None else lengths.tolist()
        # Only a CPU gains from blocks: elsewhere each sequence is one.
        block = max(1, num_frames)
        if x.device.type == "cpu":
            block = max(16, BLOCK_ELEMENTS * torch.get_num_threads() // max(1, channels))
        return cls(ends, reverse, silu, torch.promote_types(x.dtype, torch.float32), block)

    def taps(self, weight: Tensor) -> Tensor:
        """(D, K) to (K, D), in the order of time."""
        taps = weight.to(self.dtype).t()
        return (taps.flip(0) if self.reverse else taps).contiguous()

    def in_time(self, state: Tensor) -> Tensor:
        """(B, D, K-1) in the order of the scan to (B, K-1, D) in the order of time."""
        return state.transpose(1, 2).flip(1) if self.reverse else state.transpose(1, 2)

    def in_scan(self, history: Tensor) -> Tensor:
        """The way back."""
        return (history.flip(1) if self.reverse else history).transpose(1, 2)

    def histories(self, state: Tensor | None, x: Tensor, past: int) -> Tensor:
        return x.new_zeros(x.size(0), past, x.size(2)) if state is None else self.in_time(state)

    def blocks(self, end: int) -> Iterator[slice]:
        return (slice(start, min(start + self.block, end)) for start in range(0, end, self.block))


class Extended(NamedTuple):
    """``e``: the valid frames of one sequence (n, D) and its history (K-1, D), which are not copied together."""

    frames: Tensor
    history: Tensor
    reverse: bool

    def parts(self, start: int, stop: int) -> list[Tensor]:
        """Views of e[start:stop] in the order of time, one of which can be empty."""
        border = self.frames.size(0) if self.reverse else self.history.size(0)
        first, second = (self.frames, self.history) if self.reverse else (self.history, self.frames)
        return [first[start : min(stop, border)], second[max(start - border, 0) : max(stop - border, 0)]]

    def read(self, start: int, stop: int, out: Tensor) -> Tensor:
        first, second = self.parts(start, stop)
        out = out[: stop - start]
        out[: first.size(0)] = first
        out[first.size(0) :] = second
        return out

    def write(self, start: int, values: Tensor) -> None:
        first, second = self.parts(start, start + values.size(0))
        first.copy_(values[: first.size(0)])
        second.copy_(values[first.size(0) :])

    def add(self, start: int, values: Tensor) -> None:
        first, second = self.parts(start, start + values.size(0))
        first += values[: first.size(0)]
        second += values[first.size(0) :]

    def last_seen(self) -> int:
        """Where the K-1 frames begin that the scan saw last."""
        return 0 if self.reverse else self.frames.size(0)


class ShortConv(torch.autograd.Function):
    """The convolution with its backward pass by recomputation; saves the inputs alone."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        return run_forward(plan, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        return None, *run_backward(ctx.plan, *ctx.saved_tensors, grad_y, grad_state)


def run_forward(
    plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    batch, num_frames, channels = x.shape
    past, taps = weight.size(1) - 1, plan.taps(weight)
    histories = plan.histories(initial_state, x, past)
    y, state = x.new_empty(x.shape), x.new_empty(batch, past, channels)
    bias = taps.new_zeros(channels) if bias is None else bias.to(plan.dtype)
    scratch, sums = taps.new_empty(2, min(plan.block, num_frames) + past, channels).unbind()
    for row, end in enumerate(plan.ends):
        extended = Extended(x[row, :end], histories[row], plan.reverse)
        for frames in plan.blocks(end):
            seen = extended.read(frames.start, frames.stop + past, scratch)
            into_y = y.dtype == plan.dtype
            total = convolve(seen, taps, bias, y[row, frames] if into_y else sums)
            if plan.silu:
                F.silu(total, inplace=True)
            if not into_y:
                y[row, frames] = total
        y[row, end:] = 0
        last = extended.last_seen()
        extended.read(last, last + past, state[row])
    return y, plan.in_scan(state)


def run_backward(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    grad_y: Tensor,
    grad_state: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, the weight, the bias and the initial state."""
    batch, num_frames, channels = x.shape
    past, taps = weight.size(1) - 1, plan.taps(weight)
    histories, grad_last = plan.histories(initial_state, x, past), plan.in_time(grad_state)
    row_backward = RowBackward(plan, taps, bias, min(plan.block, num_frames))
    grad_x, grad_history = x.new_empty(x.shape), taps.new_empty(batch, past, channels)
    for row, end in enumerate(plan.ends):
        grads = Extended(grad_x[row, :end], grad_history[row], plan.reverse)
        row_backward.run(Extended(x[row, :end], histories[row], plan.reverse), grad_y[row], grads)
        grads.add(grads.last_seen(), grad_last[row])
        grad_x[row, end:] = 0
    grad_taps = row_backward.grad_taps.flip(0) if plan.reverse else row_backward.grad_taps
    grad_bias = None if bias is None else row_backward.grad_bias.to(bias.dtype)
    grad_state = None if initial_state is None else plan.in_scan(grad_history).to(initial_state.dtype)
    return grad_x, grad_taps.t().to(weight.dtype), grad_bias, grad_state


class RowBackward:
    """The backward pass of one sequence after another; adds up the gradients of the taps (K, D) and the bias (D,)."""

    def __init__(self, plan: Plan, taps: Tensor, bias: Tensor | None, max_frames: int):
        width, channels = taps.shape
        self.plan, self.taps, self.flipped = plan, taps, taps.flip(0)
        self.grad_taps, self.grad_bias = torch.zeros_like(taps), taps.new_zeros(channels)
        self.zeros = taps.new_zeros(channels)
        self.bias = self.zeros if bias is None else bias.to(plan.dtype)
        # The last block of gradients is that of the history, K-1 frames.
        shape = (max(max_frames, width - 1) + width - 1, channels)
        self.seen, self.work, self.grad_sums = taps.new_empty(3, *shape).unbind()

    def run(self, extended: Extended, grad_y: Tensor, grads: Extended) -> None:
        """The gradient of ``extended`` into ``grads``, in ascending blocks.

        Entry j of e was multiplied into the sums of frames j-K+1 to j: each block leaves the gradients of its last K-1
        sums to the next, in front of ``grad_sums``.
        """
        past, end = self.taps.size(0) - 1, extended.frames.size(0)
        self.grad_sums[:past] = 0
        for frames in self.plan.blocks(end):
            num_frames = frames.stop - frames.start
            seen = extended.read(frames.start, frames.stop + past, self.seen)
            grad_sums = self.grad_sums[past : past + num_frames]
            grad_sums.copy_(grad_y[frames])
            if self.plan.silu:
                total = convolve(seen, self.taps, self.bias, self.work)
                torch.ops.aten.silu_backward.grad_input(grad_sums, total, grad_input=grad_sums)
            self._add_parameters(seen, grad_sums)
            self._finish(frames.start, num_frames, grads)
        self.grad_sums[past : 2 * past] = 0
        self._finish(end, past, grads)

    def _add_parameters(self, seen: Tensor, grad_sums: Tensor) -> None:
        num_frames = grad_sums.size(0)
        self.grad_bias += grad_sums.sum(0)
        for k, grad_tap in enumerate(self.grad_taps):
            grad_tap += torch.mul(grad_sums, seen[k : k + num_frames], out=self.work[:num_frames]).sum(0)

    def _finish(self, start: int, num_frames: int, grads: Extended) -> None:
        """Gradients of e[start : start + num_frames], and the last K-1 of the sums' to the front."""
        past = self.taps.size(0) - 1
        used = self.grad_sums[: num_frames + past]
        grads.write(start, convolve(used, self.flipped, self.zeros, self.work))
        self.grad_sums[:past] = used[num_frames:].clone()


def convolve(seen: Tensor, taps: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """bias + K shifted multiply-adds over ``seen`` (frames + K-1, D), into the first frames of ``out``."""
    width = taps.size(0)
    num_frames = seen.size(0) - width + 1
    out = torch.addcmul(bias, seen[:num_frames], taps[0], out=out[:num_frames])
    for k in range(1, width):
        out.addcmul_(seen[k : k + num_frames], taps[k])
    return out
