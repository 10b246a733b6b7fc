"""Causal depthwise convolution in blocks of frames that stay in a CPU's caches, with its own backward pass.

In the order of time, frame i of one sequence is ``act(bias + sum_k taps_k e_{i+k})``, where ``e`` are the sequence's n
valid frames with the K-1 frames of history that the scan saw before: in front of them, or behind them in reverse, the
taps then in opposite order. A block copies its part of ``e`` into scratch, where K shifted multiply-adds are cheap;
nothing of the sequence's length is made but the output and, backwards, the gradients.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cald_speech.ops.short_conv.torch_blocked_backward import run_backward
from cald_speech.ops.short_conv.torch_steps import Extended, Plan, convolve


def short_conv_blocked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str = "silu",
) -> Tensor | tuple[Tensor, Tensor]:
    """Same signature and result as :func:`cald_speech.ops.short_conv`, which documents it."""
    tensors = (x, weight, bias, initial_state)
    plan = Plan.of(x, lengths, reverse, silu=activation == "silu")
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        y, state = ShortConv.apply(plan, *tensors)
    else:
        y, state = run_forward(plan, *tensors)
    return (y, state) if return_final_state else y


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
