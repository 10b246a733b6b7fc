"""SSD on a GPU: Triton kernels of our own, forward and backward: one direction, both from one load, or two scans.

The scan in chunks of Dao & Gu (arXiv 2405.21060, section 6), in four launches: running sums of log decays; what each
chunk adds to the state; the state before each chunk; the outputs. The backward pass works the states out again, runs
the second and third launch once more for the gradient of the states, and ends with one launch for the gradients that
belong to a head and one for those that heads share. No atomics: results are the same to the bit in every run.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cald_speech.ops.ssd import head_parts, ssd, ssd_bidirectional, ssd_pair
from cald_speech.ops.ssd.triton.launch import Inputs, Scans
from cald_speech.ops.ssd.triton.tiling import largest_part, tiling
from cald_speech.ops.triton import mend_interpreter, unit_stride

mend_interpreter()


def ssd_triton(x, dt, A, B, C, D, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.ssd`, which documents arguments and result.

    ``chunk_size`` is accepted for that reason: the table of launch configurations chooses the chunk.
    """
    if not x.numel():
        state = x.new_zeros(x.size(0), *x.shape[2:], B.size(3), dtype=torch.float32)
        state = state if initial_state is None else initial_state.float()
        return (x.clone(), state) if return_final_state else x.clone()
    directions = (not reverse, reverse)
    scan = Inputs(x, dt[:, :, None], A[None], B, C, D)
    (y,), state = _scan([scan], initial_state, lengths, directions, with_state=return_final_state)
    return (y, state) if return_final_state else y


def ssd_bidirectional_triton(x, dt, A, B, C, D, *, lengths, chunk_size):
    """:func:`cald_speech.ops.ssd_bidirectional`, which documents arguments and result."""
    if not x.numel():
        return x.clone()
    (y,), _ = _scan([Inputs(x, dt, A, B, C, D)], None, lengths, (True, True), with_state=False)
    return y


def ssd_pair_triton(x, dt, A, B, C, D, *, lengths, chunk_size):
    """:func:`cald_speech.ops.ssd_pair`, which documents arguments and result."""
    if not x[0].numel():
        return x[0].clone(), x[1].clone()
    each = zip(x, dt, A, B, C, D or (None, None), strict=True)
    scans = [Inputs(x, dt[:, :, None], A[None], B, C, D) for x, dt, A, B, C, D in each]
    (past, future), _ = _scan(scans, None, lengths, (True, True), with_state=False)
    return past, future


def warmup(
    heads: int, head_dim: int, groups: int, d_state: int, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Compile the kernels for these sizes, so that no first step pauses for them.

    Forwards, in reverse, both and a pair, with lengths and without, forward and backward pass; a scan with an initial
    or a final state compiles two small kernels more at its first call.
    """
    x = torch.zeros(1, 1, heads, head_dim, dtype=dtype, device=device, requires_grad=True)
    B = torch.zeros(1, 1, groups, d_state, dtype=dtype, device=device)
    dt, A, D = (torch.ones(shape, device=device) for shape in ((1, 1, 2, heads), (2, heads), (heads,)))
    for lengths in (None, torch.ones(1, dtype=torch.long, device=device)):
        options = {"lengths": lengths, "backend": "triton"}
        y = ssd_bidirectional(x, dt, -A, B, B, D, **options)
        scan = (x, dt[:, :, 0], -A[0], B, B, D)
        for reverse in (False, True):
            y = y + ssd(*scan, reverse=reverse, **options)
        past, future = ssd_pair(*zip(scan, scan, strict=True), **options)
        (y + past + future).sum().backward()


def _scan(scans, initial_state, lengths, directions, with_state):
    """The scans' outputs and the final state of a single one. Brings the inputs into the form that the kernels take;
    its casts carry gradients."""
    x, B = scans[0].x, scans[0].B
    parts = head_parts(x.size(3), largest_part(x.dtype)) or 1
    if initial_state is not None:
        rows = (x.size(0), x.size(2) * parts, 1, x.size(3) // parts, B.size(3))
        initial_state = initial_state.float().reshape(rows).contiguous()
    lengths = lengths if lengths is None else lengths.to(x.device)
    inputs = chain.from_iterable(_prepared(one, parts) for one in scans)
    *outputs, state = _SSD.apply(initial_state, lengths, directions, with_state, *inputs)
    state = state if state is None else state.reshape(x.size(0), *x.shape[2:], B.size(3))
    return [y.reshape(x.shape) for y in outputs], state


def _prepared(scan: Inputs, parts: int) -> Inputs:
    """Parameters in float32 whatever they come in, B and C in the dtype of x, and each head cut into ``parts``."""
    x, dt, A, B, C, D = scan
    A, D = (v if v is None else v.float() for v in (A, D))
    if parts > 1:
        x = x.unflatten(3, (parts, -1)).flatten(2, 3)
        dt, A, D = (v if v is None else v.repeat_interleave(parts, dim=-1) for v in (dt, A, D))
    x, dt, B, C = map(unit_stride, (x, dt, B.to(x.dtype), C.to(x.dtype)))
    return Inputs(x, dt, A.contiguous(), B, C, D if D is None else D.contiguous())


class _SSD(torch.autograd.Function):
    """``inputs`` are those of the first scan, then those of the second where there is one."""

    @staticmethod
    def forward(ctx, initial_state, lengths, directions, with_state, *inputs):
        x, _, _, B, *_ = inputs
        with torch.cuda.device_of(x):
            scans = Scans(_each(inputs), lengths, *directions, tiling(x.dtype, B.size(3), gradient=False))
            shape = (x.size(0), x.size(2), scans.directions, x.size(3), B.size(3))
            final = scans.new(*shape) if with_state else None
            decays = scans.decays()
            initial = None if initial_state is None else [initial_state]
            outputs = scans.outputs(decays, scans.states(decays, initial, final))
        ctx.save_for_backward(initial_state, lengths, *inputs)
        ctx.directions = directions
        ctx.set_materialize_grads(False)
        return *outputs, final if final is None else final[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        initial_state, lengths, *inputs = ctx.saved_tensors
        x, _, _, B, *_ = inputs
        *dy, dfinal = gradients
        dy = [torch.zeros_like(x) if v is None else unit_stride(v) for v in dy]
        dfinal = None if dfinal is None else [dfinal.contiguous()]
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        with torch.cuda.device_of(x):
            scans = Scans(_each(inputs), lengths, *ctx.directions, tiling(x.dtype, B.size(3), gradient=True))
            decays = scans.decays()
            entering = scans.states(decays, None if initial_state is None else [initial_state], None)
            leaving = scans.states(decays, dfinal, None if dinitial is None else [dinitial], dy)
            found = scans.inputs_gradient(dy, decays, entering, leaving)
            found |= scans.maps_gradient(dy, decays, entering, leaving)
        by_scan = chain.from_iterable(zip(*(found[name] for name in Inputs._fields), strict=True))
        cast = [g if g is None else g.to(v.dtype) for v, g in zip(inputs, by_scan, strict=True)]
        return dinitial, None, None, None, *cast


def _each(inputs: Sequence[Tensor]) -> list[Inputs]:
    return [Inputs(*one) for one in zip(*[iter(inputs)] * len(Inputs._fields), strict=True)]
