"""The short convolution by the C beside this file: one pass over memory each way.

A thread takes a block of frames of one sequence and a strip of its channels at a time. How the work is cut up depends
on the sizes alone, and nobody adds to what others wrote: the result is the same whatever the number of threads. The
backward pass keeps the inputs alone and computes each block's sums again.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cald_speech.ops.native.call import Call, Strided, padded, with_half_precision

FRAMES_PER_TASK = 128  # the backward pass computes K-1 frames more for each, and writes K+1 rows of sums
STRIP_CHANNELS = 1024  # a tile's rows, some 30 in the backward pass, stay in a core's second cache
TILE_FRAMES = 4  # of short_conv.h
ELEMENTS_PER_THREAD = 2**14  # waking another one takes as long


class _Convolution(ctypes.Structure):
    """``Conv`` of short_conv.h beside it, field by field."""

    _sizes = ("batch", "frames", "channels", "taps", "block", "blocks", "strip", "threads", "reverse", "silu")
    _fields_ = [
        *((name, ctypes.c_int64) for name in _sizes),
        *((name, ctypes.c_void_p) for name in ("lengths", "taps_bias", "history", "state")),
        *((name, Strided) for name in ("x", "y")),
        *((name, ctypes.c_void_p) for name in ("dhistory", "block_sums", "dtaps_bias")),
        ("dx", Strided),
    ]


@with_half_precision(casts_state=True)
def short_conv_native(x, weight, bias, *, lengths, reverse, initial_state, return_final_state, activation):
    """:func:`cald_speech.ops.short_conv`, which documents arguments and result."""
    y, state = _convolve(x, weight, bias, initial_state, lengths, reverse, activation == "silu")
    return (y, state) if return_final_state else y


def _convolve(*arguments: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in arguments):
        return _NativeShortConv.apply(*arguments)
    return _forward(*arguments)


class _NativeShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, lengths, reverse, silu):
        ctx.save_for_backward(x, weight, bias, initial_state, lengths)
        ctx.options = reverse, silu
        return _forward(x, weight, bias, initial_state, lengths, reverse, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        # Read once: under non-reentrant gradient checkpointing a second reading is refused.
        x, weight, bias, initial_state, lengths = ctx.saved_tensors
        channels, taps = weight.shape
        call = _call(x, weight, bias, initial_state, lengths, *ctx.options)
        dx, dhistory = x.new_empty(x.shape), x.new_empty(x.size(0), taps - 1, channels)
        blocks = x.size(0) * call.arguments.blocks
        block_sums, dtaps_bias = (x.new_empty(n, taps + 1, padded(channels)) for n in (blocks, 1))
        call.strided(y=dy[:, :, None])
        call.written(dx=dx[:, :, None])
        call.contiguous(state=dstate.transpose(1, 2).float(), dhistory=dhistory)
        call.contiguous(block_sums=block_sums, dtaps_bias=dtaps_bias)
        call.run("backward")
        dweight, dbias = dtaps_bias[0, :taps, :channels].t(), dtaps_bias[0, taps, :channels]
        gradients = (dx, dweight, dbias, dhistory.transpose(1, 2))
        inputs = (x, weight, bias, initial_state)
        cast = [None if v is None else g.to(v.dtype) for g, v in zip(gradients, inputs, strict=True)]
        return *cast, None, None, None


def _forward(x, weight, bias, initial_state, lengths, reverse, silu) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    call = _call(x, weight, bias, initial_state, lengths, reverse, silu)
    y, state = x.new_empty(x.shape), x.new_empty(x.size(0), weight.size(1) - 1, x.size(2))
    call.written(y=y[:, :, None])
    call.contiguous(state=state)
    call.run("forward")
    return y, state.transpose(1, 2)


def _call(x, weight, bias, initial_state, lengths, reverse, silu) -> Call:
    """The arguments that the forward and the backward pass share."""
    batch, num_frames, channels = x.shape
    taps = weight.size(1)
    # A long filter's blocks are as long, or they would compute more of their neighbours than of their own.
    block = max(FRAMES_PER_TASK, -(-taps // TILE_FRAMES) * TILE_FRAMES)
    blocks = max(1, -(-num_frames // block))
    strips = max(1, -(-channels // STRIP_CHANNELS))
    strip = max(1, padded(-(-channels // strips)))
    tasks = min(batch * blocks * strips, x.numel() // ELEMENTS_PER_THREAD)
    threads = max(1, min(torch.get_num_threads(), tasks))
    sizes = (batch, num_frames, channels, taps, block, blocks, strip, threads)
    call = Call("short_conv", _Convolution(*sizes, reverse, silu))
    taps_bias = x.new_zeros(taps + 1, padded(channels))
    taps_bias[:taps, :channels] = weight.detach().t()
    if bias is not None:
        taps_bias[taps, :channels] = bias.detach()
    history = x.new_zeros(batch, taps - 1, channels) if initial_state is None else initial_state.transpose(1, 2).float()
    call.strided(x=x[:, :, None])
    call.contiguous(taps_bias=taps_bias, history=history)
    call.contiguous(lengths=None if lengths is None else lengths.long())
    return call
