"""SSD by the C beside this file: chunk by chunk and head by head in a CPU's first caches.

The mathematics is :mod:`~cald_speech.ops.ssd.torch_chunked`'s; what goes is everything between its matrix products.
Each thread takes one sequence and some heads of a group at a time and writes to nobody else's memory, so the result is
the same each time; only how a group's heads are parted, and with it the last bit of dB and dC, depends on the number
of threads.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cald_speech.ops.native.call import Call, Strided, padded, parts_of, with_half_precision
from cald_speech.ops.ssd.two_scans import pair_by

CHUNK_SIZE = 32  # the fastest at head and state sizes of 64 and 128: docs/results/scans.md
MOST_CHUNK_SIZE = 256
FRAMES_PER_KEPT_STATE = 256  # from one kept state to the next: what is computed again fits a core's second cache
_LOG2_E = 1.4426950408889634


class _Scan(ctypes.Structure):
    """``Scan`` of ssd.h beside it, field by field."""

    _sizes = ("batch", "frames", "heads", "head_dim", "groups", "d_state", "chunk", "block", "kept_blocks")
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_sizes, "parts", "threads", "reverse", "add")),
        *((name, ctypes.c_void_p) for name in ("lengths", "A", "D", "state", "kept")),
        *((name, Strided) for name in ("x", "dt", "B", "C", "y")),
        *((name, ctypes.c_void_p) for name in ("dA", "dD")),
        *((name, Strided) for name in ("dx", "ddt", "dB", "dC")),
    ]


@with_half_precision()
def ssd_native(x, dt, A, B, C, D, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.ssd`, which documents arguments and result."""
    y, state = _scan(x, dt[:, :, None], A[None], B, C, D, initial_state, lengths, (reverse,), chunk_size)
    return (y, state) if return_final_state else y


@with_half_precision()
def ssd_bidirectional_native(x, dt, A, B, C, D, *, lengths, chunk_size):
    """One scan, and the other added to it where it lies."""
    return _scan(x, dt, A, B, C, D, None, lengths, (False, True), chunk_size)[0]


ssd_pair_native = pair_by(ssd_native)  # each scan on all threads


def _scan(x, dt, A, B, C, D, initial_state, lengths, directions, chunk_size):
    """dt (B, T, K, H) and A (K, H) for K directions, each True for reverse; the state is the last one's."""
    tensors = (x, dt, A, B, C, D, initial_state)
    chunk_size = chunk_size or CHUNK_SIZE
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        return _NativeScan.apply(*tensors, lengths, directions, chunk_size)
    y = x.new_empty(x.shape)
    return y, _forward(y, *tensors, lengths, directions, chunk_size)[-1][0]


class _NativeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, lengths, directions, chunk_size):
        y = x.new_empty(x.shape)
        made = _forward(y, x, dt, A, B, C, D, initial_state, lengths, directions, chunk_size, keep_states=True)
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, lengths, *(kept for _, kept in made))
        ctx.directions, ctx.chunk_size = directions, chunk_size
        return y, made[-1][0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, dt, A, B, C, D, initial_state, lengths, *kept = ctx.saved_tensors
        dx, ddt = x.new_empty(x.shape), x.new_empty(dt.shape)
        # Sums over all frames: in float64, since a float32 sum over hours of them would drift.
        dA, dD = (x.new_zeros(len(kept), x.size(0), x.size(2), dtype=torch.float64) for _ in range(2))
        dmaps = []
        for k, reverse in enumerate(ctx.directions):
            call = _call(x, dt[:, :, k], A[k], B, C, None if k else D, lengths, reverse, ctx.chunk_size, add=k > 0)
            dmaps.append([x.new_empty(call.arguments.parts, *B.shape) for _ in range(2)])
            call.strided(y=dy)
            call.written(dx=dx, ddt=ddt[:, :, k, :, None])
            call.written(**{name: v.flatten(0, 1) for name, v in zip(("dB", "dC"), dmaps[k], strict=True)})
            dinitial = dstate.to(torch.float32, copy=True).contiguous()
            call.contiguous(state=dinitial, kept=kept[k], dA=dA[k], dD=dD[k])
            call.arguments.kept_blocks = kept[k].size(2)
            call.run("backward")
        dB, dC = (torch.cat(v).sum(0) if len(kept) * v[0].size(0) > 1 else v[0][0] for v in zip(*dmaps, strict=True))
        gradients = [dx, ddt, dA.sum(1), dB, dC, dD.sum((0, 1)), dinitial]
        inputs = [x, dt, A, B, C, D, initial_state]
        cast = [None if v is None else g.to(v.dtype) for g, v in zip(gradients, inputs, strict=True)]
        return *cast, None, None, None


def _forward(y, x, dt, A, B, C, D, initial_state, lengths, directions, chunk_size, keep_states=False):
    """Of each direction what :func:`ssd_into_native` returns."""
    made = []
    for k, reverse in enumerate(directions):
        tensors = (x, dt[:, :, k], A[k], B, C, None if k else D, initial_state, lengths)
        options = {"reverse": reverse, "chunk_size": chunk_size, "keep_states": keep_states, "add": k > 0}
        made.append(ssd_into_native(y, *tensors, **options))
    return made


def ssd_into_native(
    y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
    chunk_size: int = CHUNK_SIZE,
    keep_states: bool = False,
    add: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scan into ``y`` (B, T, H, P), preallocated, or add to it. Returns the final state (B, H, P, N) and the states on
    entering each block (B, H, blocks, N, P), padded to whole vectors, none of them without ``keep_states``."""
    call = _call(x, dt, A, B, C, D, lengths, reverse, chunk_size, add)
    batch, num_frames, heads, head_dim = x.shape
    if initial_state is None:
        state = x.new_zeros(batch, heads, head_dim, B.size(3))
    else:
        state = initial_state.to(torch.float32, copy=True).contiguous()
    blocks = -(-num_frames // (call.arguments.chunk * call.arguments.block)) if keep_states else 0
    kept = x.new_empty(batch, heads, blocks, padded(B.size(3)), padded(head_dim))
    call.written(y=y)
    call.contiguous(state=state, kept=kept if keep_states else None)
    call.arguments.kept_blocks = blocks
    call.run("forward")
    return state, kept


def _call(x, dt, A, B, C, D, lengths, reverse, chunk_size, add) -> Call:
    """The arguments that the forward and the backward pass share."""
    batch, num_frames, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    chunk = padded(min(chunk_size, MOST_CHUNK_SIZE, max(num_frames, 1)))
    arguments = _Scan(
        batch, num_frames, heads, head_dim, groups, d_state, chunk, max(1, FRAMES_PER_KEPT_STATE // chunk)
    )
    arguments.parts = parts_of(heads // groups, batch * groups)
    arguments.threads = max(1, min(torch.get_num_threads(), batch * groups * arguments.parts))
    arguments.reverse, arguments.add = reverse, add
    call = Call("ssd", arguments)
    call.strided(x=x, dt=dt[..., None], B=B, C=C)
    call.contiguous(A=A.double() * _LOG2_E, D=None if D is None else D.float())
    call.contiguous(lengths=None if lengths is None else lengths.long())
    return call
