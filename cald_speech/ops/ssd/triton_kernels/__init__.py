"""SSD on a GPU: Triton kernels of our own, forward and backward, with one direction or both from one load.

The scan in chunks of Dao & Gu (arXiv 2405.21060, section 6), in four launches: running sums of log decays; what each
chunk adds to the state; the state before each chunk; the outputs. The backward pass works the states out again, runs
the second and third launch once more for the gradient of the states, and ends with one launch for the gradients that
belong to a head and one for those that heads share. No atomics: results are the same to the bit in every run.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cald_speech.ops.ssd.limits import head_parts
from cald_speech.ops.ssd.triton_kernels.launch import Scan, largest_part, tiling


def ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same signature and result as :func:`cald_speech.ops.ssd`, which documents it. Example: see there.

    ``chunk_size`` is accepted for that reason: the table of launch configurations chooses the chunk.
    """
    if not x.numel():
        state = x.new_zeros(x.size(0), *x.shape[2:], B.size(3), dtype=torch.float32)
        state = state if initial_state is None else initial_state.float()
        return (torch.zeros_like(x), state) if return_final_state else torch.zeros_like(x)
    directions = (not reverse, reverse)
    y, state = _scan(
        x, dt[:, :, None], A[None], B, C, D, initial_state, lengths, directions, with_state=return_final_state
    )
    return (y, state) if return_final_state else y


def ssd_bidirectional_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """Same signature and result as :func:`cald_speech.ops.ssd_bidirectional`. Example: see there."""
    if not x.numel():
        return torch.zeros_like(x)
    return _scan(x, dt, A, B, C, D, None, lengths, (True, True), with_state=False)[0]


def warmup(
    heads: int, head_dim: int, groups: int, d_state: int, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Compile the kernels for these sizes, so that no first step pauses for them.

    Forwards, in reverse and both, with lengths and without, forward and backward pass; a scan with an initial or a
    final state compiles two small kernels more at its first call.
    """
    x = torch.zeros(1, 1, heads, head_dim, dtype=dtype, device=device, requires_grad=True)
    B = torch.zeros(1, 1, groups, d_state, dtype=dtype, device=device)
    dt, A, D = (torch.ones(shape, device=device) for shape in ((1, 1, 2, heads), (2, heads), (heads,)))
    for lengths in (None, torch.ones(1, dtype=torch.long, device=device)):
        y = ssd_bidirectional_triton(x, dt, -A, B, B, D, lengths=lengths)
        for reverse in (False, True):
            y = y + ssd_triton(x, dt[:, :, 0], -A[0], B, B, D, lengths=lengths, reverse=reverse)
        y.sum().backward()


def _scan(x, dt, A, B, C, D, initial_state, lengths, directions, with_state):
    """dt (B, T, K, H), A (K, H). Brings the inputs into the form that the kernels take; its casts carry gradients."""
    batch, num_frames, heads, head_dim = x.shape
    # Parameters and states in float32 whatever they come in.
    A, D, initial_state = (v if v is None else v.float() for v in (A, D, initial_state))
    B, C = B.to(x.dtype), C.to(x.dtype)
    parts = head_parts(head_dim, largest_part(x.dtype)) or 1
    if parts > 1:
        x = x.unflatten(3, (parts, -1)).flatten(2, 3)
        dt, A, D = (v if v is None else v.repeat_interleave(parts, dim=-1) for v in (dt, A, D))
    if initial_state is not None:
        initial_state = initial_state.reshape(batch, heads * parts, 1, head_dim // parts, B.size(3)).contiguous()
    A, D = A.contiguous(), D if D is None else D.contiguous()
    lengths = lengths if lengths is None else lengths.to(x.device)
    y, state = _SSD.apply(
        *map(_unit_stride, (x, dt)), A, *map(_unit_stride, (B, C)), D, initial_state, lengths, directions, with_state
    )
    return y.reshape(batch, num_frames, heads, head_dim), state if state is None else state.reshape(
        batch, heads, head_dim, -1
    )


def _unit_stride(v: Tensor) -> Tensor:
    """The tensor itself where its last axis has stride 1, as that of every slice of a projection has; else a copy."""
    return v if v.stride(-1) == 1 else v.contiguous()


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, lengths, directions, with_state):
        with torch.cuda.device_of(x):
            scan = Scan(x, dt, A, B, C, D, lengths, *directions, tiling(x.dtype, B.size(3), gradient=False))
            final = scan.new(x.size(0), x.size(2), scan.directions, x.size(3), B.size(3)) if with_state else None
            decays = scan.decays()
            y = scan.outputs(decays, scan.states(decays, initial_state, final))
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, lengths)
        ctx.directions = directions
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        *inputs, initial_state, lengths = ctx.saved_tensors
        x, B = inputs[0], inputs[3]
        dy = torch.zeros_like(x) if dy is None else _unit_stride(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        with torch.cuda.device_of(x):
            scan = Scan(*inputs, lengths, *ctx.directions, tiling(x.dtype, B.size(3), gradient=True))
            decays = scan.decays()
            entering = scan.states(decays, initial_state, None)
            leaving = scan.states(decays, dfinal, dinitial, dy)
            gradients = scan.inputs_gradient(dy, decays, entering, leaving)
            gradients |= scan.maps_gradient(dy, decays, entering, leaving)
        names = ("x", "dt", "A", "B", "C", "D")
        cast = [g if g is None else g.to(v.dtype) for v, g in zip(inputs, map(gradients.get, names), strict=True)]
        return *cast, dinitial, None, None, None
