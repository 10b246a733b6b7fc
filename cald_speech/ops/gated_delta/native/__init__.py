"""The gated delta rule by the C beside this file: chunk by chunk and head by head in a CPU's first caches.

The mathematics is :mod:`~cald_speech.ops.gated_delta.torch_chunked`'s, but that each chunk's triangular system is
solved once, for the state that there is. Each thread takes one sequence and some heads of a group at a time and writes
to nobody else's memory, so the result is the same each time; only how a group's heads are parted, and with it the last
bit of dq and dk, depends on the number of threads.
"""

import ctypes

import torch
from torch.autograd.function import once_differentiable

from cald_speech.ops.native.call import Call, Strided, padded, parts_of, with_half_precision

CHUNK_SIZE = 32  # the fastest at head and state sizes of 64: cald-speech benchmark ops
MOST_CHUNK_SIZE = 256
FRAMES_PER_KEPT_STATE = 256  # from one kept state to the next: what is computed again fits a core's second cache


class _Delta(ctypes.Structure):
    """``Delta`` of gated_delta.h beside it, field by field."""

    _sizes = ("batch", "frames", "heads", "head_dim", "groups", "d_state", "chunk", "block", "kept_blocks")
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_sizes, "parts", "threads", "reverse", "per_channel")),
        *((name, ctypes.c_void_p) for name in ("lengths", "state", "kept")),
        *((name, Strided) for name in ("q", "k", "v", "beta", "g", "y", "dq", "dk", "dv", "dbeta", "dg")),
    ]


@with_half_precision(stream=2)
def gated_delta_native(q, k, v, beta, g, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.gated_delta`, which documents arguments and result."""
    tensors = (q, k, v, beta, g, initial_state)
    chunk_size = chunk_size or CHUNK_SIZE
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        y, state = _NativeDelta.apply(*tensors, lengths, reverse, chunk_size)
    else:
        y, state, _ = _forward(*tensors, lengths, reverse, chunk_size)
    return (y, state) if return_final_state else y


class _NativeDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial_state, lengths, reverse, chunk_size):
        y, state, kept = _forward(q, k, v, beta, g, initial_state, lengths, reverse, chunk_size, keep_states=True)
        ctx.save_for_backward(q, k, v, beta, g, initial_state, lengths, kept)
        ctx.reverse, ctx.chunk_size = reverse, chunk_size
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        q, k, v, beta, g, initial_state, lengths, kept = ctx.saved_tensors
        call = _call(q, k, v, beta, g, lengths, ctx.reverse, ctx.chunk_size)
        parts = call.arguments.parts
        dq, dk = (v.new_empty(parts, *k.shape) for _ in range(2))
        dv, dbeta, dg = (v.new_empty(tensor.shape) for tensor in (v, beta, g))
        dinitial = dstate.to(torch.float32, copy=True).contiguous()
        call.strided(y=dy)
        call.written(dq=dq.flatten(0, 1), dk=dk.flatten(0, 1), dv=dv, dbeta=dbeta[..., None], dg=_with_channels(dg))
        call.contiguous(state=dinitial, kept=kept)
        call.arguments.kept_blocks = kept.size(2)
        call.run("backward")
        dq, dk = (parted.sum(0) if parts > 1 else parted[0] for parted in (dq, dk))
        gradients, inputs = (dq, dk, dv, dbeta, dg, dinitial), (q, k, v, beta, g, initial_state)
        cast = [None if v is None else gradient.to(v.dtype) for gradient, v in zip(gradients, inputs, strict=True)]
        return *cast, None, None, None


def _forward(q, k, v, beta, g, initial_state, lengths, reverse, chunk_size, keep_states=False):
    """y, the final state (B, H, P, N) and the states on entering each block (B, H, blocks, N, P), padded to whole
    vectors, none of them without ``keep_states``."""
    call = _call(q, k, v, beta, g, lengths, reverse, chunk_size)
    batch, num_frames, heads, head_dim = v.shape
    y = v.new_empty(v.shape)
    if initial_state is None:
        state = v.new_zeros(batch, heads, head_dim, k.size(3))
    else:
        state = initial_state.to(torch.float32, copy=True).contiguous()
    blocks = -(-num_frames // (call.arguments.chunk * call.arguments.block)) if keep_states else 0
    kept = v.new_empty(batch, heads, blocks, padded(k.size(3)), padded(head_dim))
    call.written(y=y)
    call.contiguous(state=state, kept=kept if keep_states else None)
    call.arguments.kept_blocks = blocks
    call.run("forward")
    return y, state, kept


def _call(q, k, v, beta, g, lengths, reverse, chunk_size) -> Call:
    """The arguments that the forward and the backward pass share."""
    batch, num_frames, heads, head_dim = v.shape
    groups, d_state = k.shape[2:]
    chunk = padded(min(chunk_size, MOST_CHUNK_SIZE, max(num_frames, 1)))
    block = max(1, FRAMES_PER_KEPT_STATE // chunk)
    arguments = _Delta(batch, num_frames, heads, head_dim, groups, d_state, chunk, block)
    arguments.parts = parts_of(heads // groups, batch * groups)
    arguments.threads = max(1, min(torch.get_num_threads(), batch * groups * arguments.parts))
    arguments.reverse, arguments.per_channel = reverse, g.dim() == 4
    call = Call("gated_delta", arguments)
    call.strided(q=q, k=k, v=v, beta=beta[..., None], g=_with_channels(g))
    call.contiguous(lengths=None if lengths is None else lengths.long())
    return call


def _with_channels(g):
    return g if g.dim() == 4 else g[..., None]
