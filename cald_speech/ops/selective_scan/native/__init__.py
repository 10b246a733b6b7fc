"""The selective scan by the C beside this file: strips of channels, frame by frame.

Vectors run over 64 channels, whose states stay in a core's first cache while the frames go by; the backward pass starts
from states kept every few frames. Each thread writes to nobody else's memory, so the result is the same each time; only
the last bit of dB and dC depends on the number of threads, by which the channels are parted.
"""

import ctypes
import math

import torch
from torch.autograd.function import once_differentiable

from cald_speech.ops.native.call import Call, Strided, parts_of, with_half_precision

STRIP = 64  # of selective_scan.h
# Numbers of a block's decays, and as many of its states: together a quarter of a core's second cache.
BLOCK_ELEMENTS = 2**15
BLOCK_FRAMES = (16, 64)  # at least and at most
_LOG2_E = math.log2(math.e)


class _Selective(ctypes.Structure):
    """``Selective`` of selective_scan.h beside it, field by field."""

    _sizes = ("batch", "frames", "channels", "groups", "d_state", "block", "kept_blocks", "parts", "threads", "reverse")
    _fields_ = [
        *((name, ctypes.c_int64) for name in _sizes),
        *((name, ctypes.c_void_p) for name in ("lengths", "A", "D", "state", "kept")),
        *((name, Strided) for name in ("x", "dt", "B", "C", "y")),
        *((name, ctypes.c_void_p) for name in ("dA", "dD")),
        *((name, Strided) for name in ("dx", "ddt", "dB", "dC")),
    ]


@with_half_precision()
def selective_scan_native(x, dt, A, B, C, D, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.selective_scan`, which documents arguments and result."""
    tensors = (x, dt, A, B, C, D, initial_state)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        y, state = _NativeScan.apply(*tensors, lengths, reverse, chunk_size)
    else:
        y, state, _ = _forward(*tensors, lengths, reverse, chunk_size)
    return (y, state) if return_final_state else y


class _NativeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, lengths, reverse, chunk_size):
        y, state, kept = _forward(x, dt, A, B, C, D, initial_state, lengths, reverse, chunk_size, keep_states=True)
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, lengths, kept)
        ctx.reverse, ctx.chunk_size = reverse, chunk_size
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, dt, A, B, C, D, initial_state, lengths, kept = ctx.saved_tensors
        call = _call(x, dt, A, B, C, D, lengths, ctx.reverse, ctx.chunk_size)
        dx, ddt = x.new_empty(x.shape), x.new_empty(dt.shape)
        dB, dC = (x.new_zeros(call.arguments.parts, *B.shape) for _ in range(2))
        dA = x.new_zeros(x.size(0), *A.shape, dtype=torch.float64)
        dD = x.new_zeros(x.size(0), x.size(2), dtype=torch.float64)
        dinitial = dstate.to(torch.float32, copy=True).contiguous()
        call.strided(y=dy[:, :, None])
        call.written(dx=dx[:, :, None], ddt=ddt[:, :, None], dB=dB.flatten(0, 1), dC=dC.flatten(0, 1))
        call.contiguous(state=dinitial, kept=kept, dA=dA, dD=dD)
        call.arguments.kept_blocks = kept.size(2)
        call.run("backward")
        gradients = [dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dinitial]
        inputs = [x, dt, A, B, C, D, initial_state]
        cast = [None if v is None else g.to(v.dtype) for g, v in zip(gradients, inputs, strict=True)]
        return *cast, None, None, None


def _forward(x, dt, A, B, C, D, initial_state, lengths, reverse, chunk_size, keep_states=False):
    """y, the final state (B, D_inner, N) and the states before each block (B, strips, blocks, N, STRIP), if wanted."""
    call, y = _call(x, dt, A, B, C, D, lengths, reverse, chunk_size), x.new_empty(x.shape)
    batch, num_frames, channels = x.shape
    groups, d_state = B.shape[2:]
    if initial_state is None:
        state = x.new_zeros(batch, channels, d_state)
    else:
        state = initial_state.to(torch.float32, copy=True).contiguous()
    blocks = -(-num_frames // call.arguments.block) if keep_states else 0
    kept = x.new_empty(batch, groups * -(-channels // groups // STRIP), blocks, d_state, STRIP)
    call.written(y=y[:, :, None])
    call.contiguous(state=state, kept=kept if keep_states else None)
    call.arguments.kept_blocks = blocks
    call.run("forward")
    return y, state, kept


def _call(x, dt, A, B, C, D, lengths, reverse, chunk_size) -> Call:
    """The arguments that the forward and the backward pass share."""
    batch, num_frames, channels = x.shape
    groups, d_state = B.shape[2:]
    least, most = BLOCK_FRAMES
    block = min(chunk_size or most, max(least, min(most, BLOCK_ELEMENTS // max(1, d_state * STRIP))))
    arguments = _Selective(batch, num_frames, channels, groups, d_state, block)
    arguments.parts = parts_of(-(-channels // groups // STRIP), batch * groups)
    arguments.threads = max(1, min(torch.get_num_threads(), batch * groups * arguments.parts))
    arguments.reverse = reverse
    call = Call("selective_scan", arguments)
    call.strided(x=x[:, :, None], dt=dt[:, :, None], B=B, C=C)
    call.contiguous(A=A.float() * _LOG2_E, D=None if D is None else D.float())
    call.contiguous(lengths=None if lengths is None else lengths.long())
    return call
