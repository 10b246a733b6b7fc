"""The gated delta rule on a GPU: Triton kernels of our own, forward and backward, with a decay a head or a channel.

The scan in chunks of Yang et al. (arXiv 2412.06464), in three launches: the WY form of each chunk, which needs no
state; the states, carried from chunk to chunk; the outputs. The backward pass works the first two out again, carries
the gradient of the states back, and ends with two launches for the gradients of the inputs. No atomics: results are
the same to the bit in every run.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cald_speech.ops.gated_delta import gated_delta
from cald_speech.ops.gated_delta.triton.launch import Scan
from cald_speech.ops.triton import mend_interpreter, unit_stride

mend_interpreter()


def gated_delta_triton(
    q, k, v, beta, g, *, lengths, reverse, initial_state, return_final_state, chunk_size
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`cald_speech.ops.gated_delta`, which documents arguments and result.

    ``chunk_size`` is accepted for that reason: the table of launch configurations chooses the chunk.
    """
    if not v.numel() or not k.size(3):
        state = v.new_zeros(v.size(0), *v.shape[2:], k.size(3), dtype=torch.float32)
        state = state if initial_state is None else initial_state.float()
        return (torch.zeros_like(v), state) if return_final_state else torch.zeros_like(v)
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    # Casts carry gradients.
    inputs = map(unit_stride, (q.to(v.dtype), k.to(v.dtype), v, beta.float(), g.float()))
    lengths = lengths if lengths is None else lengths.to(v.device)
    y, state = _GatedDelta.apply(initial_state, lengths, reverse, return_final_state, *inputs)
    return (y, state) if return_final_state else y


def warmup(
    heads: int,
    head_dim: int,
    groups: int,
    d_state: int,
    dtype: torch.dtype,
    device: torch.device | str,
    channels: bool = False,
) -> None:
    """Compile the kernels for these sizes, so that no first step pauses for them.

    Forwards and in reverse, with lengths and without, forward and backward pass; a scan with an initial or a final
    state compiles two small kernels more at its first call. ``channels`` for a decay for each channel of the keys.
    """
    v = torch.zeros(1, 1, heads, head_dim, dtype=dtype, device=device, requires_grad=True)
    k = torch.zeros(1, 1, groups, d_state, dtype=dtype, device=device)
    beta = torch.zeros(1, 1, heads, device=device)
    g = torch.zeros(1, 1, heads, d_state, device=device) if channels else beta
    for lengths in (None, torch.ones(1, dtype=torch.long, device=device)):
        for reverse in (False, True):
            gated_delta(k, k, v, beta, g, lengths=lengths, reverse=reverse, backend="triton").sum().backward()


class _GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, initial_state, lengths, reverse, with_state, q, k, v, beta, g):
        scan = Scan(q, k, v, beta, g, lengths, reverse)
        with torch.cuda.device_of(v):
            made = scan.chunks(gradient=False)
            final = scan.new(v.size(0), *v.shape[2:], k.size(3)) if with_state else None
            y = scan.outputs(made, scan.states(made, initial_state, final))
        ctx.save_for_backward(initial_state, lengths, q, k, v, beta, g)
        ctx.reverse = reverse
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        initial_state, lengths, q, k, v, beta, g = ctx.saved_tensors
        dy = torch.zeros_like(v) if dy is None else unit_stride(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        scan = Scan(q, k, v, beta, g, lengths, ctx.reverse)
        with torch.cuda.device_of(v):
            made = scan.chunks(gradient=True)
            entering = scan.states(made, initial_state, None)
            leaving = scan.states_gradient(made, dy, dfinal, dinitial)
            inverses = made.inverses
            del made  # some five times the size of v, which the last two launches do without
            found = scan.gradients(inverses, dy, entering, leaving)
        return dinitial, None, None, None, *found
