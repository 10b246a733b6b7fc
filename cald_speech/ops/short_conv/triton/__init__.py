"""The short convolution in Triton: one launch forwards, one backwards, deterministic."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from cald_speech.ops.short_conv import short_conv
from cald_speech.ops.short_conv.triton.kernels import backward_kernel, forward_kernel
from cald_speech.ops.triton import mend_interpreter

mend_interpreter()

# A row of 64 channels is one or two 128-byte lines. Backwards two entries a thread, not eight: registers would spill.
FORWARD = {"BLOCK_T": 16, "BLOCK_D": 64, "num_warps": 4}
BACKWARD = {"BLOCK_T": 8, "BLOCK_D": 64, "num_warps": 8}
# Tiles of frames whose parts of the taps' gradients are added up in registers.
BACKWARD_TILES = 16


def short_conv_triton(x, weight, bias, *, lengths, reverse, initial_state, return_final_state, activation):
    """:func:`cald_speech.ops.short_conv`, which documents arguments and result."""
    bias = None if bias is None else bias.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    y, state = ShortConv.apply(x, weight, bias, initial_state, lengths, reverse, activation == "silu")
    return (y, state) if return_final_state else y


def warmup(
    channels: int,
    width: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: str = "cuda",
    weight_dtype: torch.dtype = torch.float32,
    directions: tuple[bool, ...] = (False, True),
    padded: tuple[bool, ...] = (True,),
) -> None:
    """Compile both kernels, so that the first real call need not.

    directions : which values of ``reverse`` to compile for.
    padded : whether with lengths, without, or both.

    An initial state, another activation or none of a bias compile kernels of their own, on their first call.
    """
    weight = torch.zeros(channels, width, dtype=weight_dtype, device=device, requires_grad=True)
    bias = torch.zeros(channels, dtype=weight_dtype, device=device, requires_grad=True)
    x = torch.zeros(1, 16, channels, dtype=dtype, device=device)
    for reverse in directions:
        for with_lengths in padded:
            lengths = torch.full((1,), 16, device=device) if with_lengths else None
            y = short_conv(x, weight, bias, lengths=lengths, reverse=reverse, backend="triton")
            torch.autograd.grad(y, (weight, bias), torch.zeros_like(y))


class ShortConv(torch.autograd.Function):
    """Saves its inputs alone: the backward kernel computes the sums before the activation again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        lengths: Tensor | None,
        reverse: bool,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, initial_state, lengths)
        ctx.constants = {"PAST": weight.size(1) - 1, "REVERSE": reverse, "SILU": silu}
        batch, num_frames, channels = x.shape
        y, state = x.new_empty(x.shape), x.new_empty(batch, channels, weight.size(1) - 1)
        blocks = max(1, triton.cdiv(num_frames, FORWARD["BLOCK_T"]))
        launch(
            forward_kernel, batch, blocks, channels,
            x, x.stride(), weight, weight.stride(), bias, initial_state, strides(initial_state), lengths, y, state,
            num_frames, **ctx.constants, **FORWARD,
        )  # fmt: skip
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, state, lengths = ctx.saved_tensors
        batch, num_frames, channels = x.shape
        width = weight.size(1)
        blocks = max(1, triton.cdiv(num_frames + width - 1, BACKWARD["BLOCK_T"] * BACKWARD_TILES))
        in_float32 = {"dtype": torch.float32, "device": x.device}
        grad_x, grad_history = x.new_empty(x.shape), torch.empty(batch, channels, width - 1, **in_float32)
        grad_weight = torch.empty(batch * blocks, width, channels, **in_float32)
        grad_bias = torch.empty(batch * blocks, channels, **in_float32)
        launch(
            backward_kernel, batch, blocks, channels,
            grad_y, grad_y.stride(), x, x.stride(), weight, weight.stride(), bias, state, strides(state), lengths,
            grad_state, grad_state.stride(), grad_x, grad_history, grad_weight, grad_bias, num_frames,
            TILES=BACKWARD_TILES, ROWS=triton.next_power_of_2(width + 1), **ctx.constants, **BACKWARD,
        )  # fmt: skip
        return (
            grad_x,
            grad_weight.sum(0).t().to(weight.dtype),
            None if bias is None else grad_bias.sum(0).to(bias.dtype),
            None if state is None else grad_history.to(state.dtype),
            None,
            None,
            None,
        )


def strides(state: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if state is None else state.stride()


def launch(kernel: Any, batch: int, blocks: int, channels: int, *arguments: Any, **constants: Any) -> None:
    """One program for each sequence, block of frames and block of channels: one axis, the others end at 65,535."""
    channel_blocks = triton.cdiv(channels, constants["BLOCK_D"])
    if programs := batch * blocks * channel_blocks:
        kernel[(programs,)](*arguments, channels, blocks, channel_blocks, **constants)
