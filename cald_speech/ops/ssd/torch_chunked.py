"""SSD in chunks of matrix products, block by block in a CPU's caches: linear in the frames, most of it in the BLAS.

Within a chunk the recurrence is a masked, decayed attention matrix; across chunks only the state is carried
(Dao & Gu, arXiv 2405.21060, section 6 and listing 1). With ``cum`` the running sum of dt A inside a chunk, in the
order of the scan, the weight of frame j in frame i is exp(cum_i - cum_j) <= 1, forwards and backwards alike: so
``reverse`` costs a mirrored mask and blocks in the other order, and no flip of data. Sequences are cut to their lengths
before they are computed with, so padding costs nothing. The backward pass recomputes a block from its first state.
"""

from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cald_speech.ops.ssd.torch_batched import ssd_batched
from cald_speech.ops.ssd.torch_block_steps import attention_weights, carry_states, prepare
from cald_speech.ops.ssd.torch_blocks import (
    CHUNK_SIZE,
    FRAMES_PER_BLOCK,
    Block,
    Scratch,
    Sequence,
    Triangles,
    blocks,
    from_layout,
    to_layout,
)
from cald_speech.ops.ssd.torch_chunked_backward import backward_sequence

# Numbers in a sequence's x, up to which a batch is scanned at once: 500 frames of width 128 take as long either way.
SMALL_SEQUENCE = 2**16


def ssd_chunked(
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
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same signature and result as :func:`cald_speech.ops.ssd`, which documents it. Example: see there."""
    chunk_size = chunk_size or CHUNK_SIZE
    if x.size(0) > 1 and x[0].numel() <= SMALL_SEQUENCE:
        options = {"lengths": lengths, "reverse": reverse, "initial_state": initial_state}
        return ssd_batched(x, dt, A, B, C, D, **options, return_final_state=return_final_state, chunk_size=chunk_size)
    tensors = (x, dt, A, B, C, D, initial_state)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        y, state = _ChunkedScan.apply(*tensors, lengths, reverse, chunk_size)
    else:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        state, _ = scan_into(y, *tensors, lengths, reverse=reverse, chunk_size=chunk_size)
    return (y, state) if return_final_state else y


def ssd_bidirectional_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """One scan after the other. Same signature as :func:`cald_speech.ops.ssd_bidirectional`, which documents it.

    On a CPU one matrix for both directions would save a tenth of the arithmetic: the states are what costs.
    """
    past = ssd_chunked(x, dt[:, :, 0], A[0], B, C, D, lengths=lengths, chunk_size=chunk_size)
    future = ssd_chunked(x, dt[:, :, 1], A[1], B, C, lengths=lengths, reverse=True, chunk_size=chunk_size)
    return past + future


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, lengths, reverse, chunk_size):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        state, entering = scan_into(
            y, x, dt, A, B, C, D, initial_state, lengths, reverse=reverse, chunk_size=chunk_size, keep_states=True
        )
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, lengths, entering)
        ctx.reverse, ctx.chunk_size = reverse, chunk_size
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, dt, A, B, C, D, initial_state, lengths, entering = ctx.saved_tensors
        gradients = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, dt, B, C)]
        dtype, groups = entering.dtype, B.size(2)
        # Sums over all frames: in float64, since a float32 sum over hours of them would drift.
        dA, dD = (torch.zeros_like(A, dtype=torch.float64) for _ in range(2))
        dinitial = torch.empty_like(dstate, dtype=dtype)
        scratch = Scratch(entering)
        sequences = Sequence.each(x, dt, B, C, lengths)
        for b, sequence in enumerate(sequences):
            length = sequence.x.size(0)
            for gradient in gradients:
                gradient[b, length:] = 0
            dinitial[b] = from_layout(
                backward_sequence(
                    sequence,
                    Sequence(*(gradient[b, :length] for gradient in gradients)),
                    dy[b, :length],
                    to_layout(dstate[b].to(dtype), groups),
                    (A, D, dA, dD),
                    entering[b],
                    scratch,
                    reverse=ctx.reverse,
                    chunk_size=ctx.chunk_size,
                ),
                x.size(3),
            )
        dx, ddt, dB, dC = gradients
        dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
        return dx, ddt, dA.to(A.dtype), dB, dC, None if D is None else dD.to(D.dtype), dinitial, None, None, None


def scan_into(
    y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    *,
    reverse: bool = False,
    chunk_size: int = CHUNK_SIZE,
    keep_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scan into ``y`` (B, T, H, P), preallocated; return the final state (B, H, P, N) and the states on entering each
    block (B, blocks, G, N, R * P), which without ``keep_states`` is an empty tensor."""
    batch, num_frames, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    scratch = Scratch(x.new_empty(0, dtype=dtype))
    final = x.new_empty(batch, heads, head_dim, d_state, dtype=dtype)
    most_blocks = num_frames // max(1, FRAMES_PER_BLOCK // chunk_size * chunk_size, chunk_size) + 2
    state_shape = (groups, d_state, heads // groups * head_dim)
    entering = x.new_empty(batch, most_blocks if keep_states else 0, *state_shape, dtype=dtype)
    triangles = cache(lambda size: Triangles.make(size, reverse, final))
    for b, sequence in enumerate(Sequence.each(x, dt, B, C, lengths)):
        length = sequence.x.size(0)
        y[b, length:] = 0
        state = scratch("state", *state_shape)
        state.zero_() if initial_state is None else state.copy_(to_layout(initial_state[b], groups))
        for k, block in enumerate(blocks(length, chunk_size, reverse=reverse)):
            if keep_states:
                entering[b, k] = state
            _forward_block(block, sequence, A, D, state, y[b, :length], triangles(block.size), scratch, reverse)
        final[b] = from_layout(state, head_dim)
    return final, entering


def _forward_block(
    block: Block,
    sequence: Sequence,
    A: Tensor,
    D: Tensor | None,
    state: Tensor,
    y: Tensor,
    triangles: Triangles,
    scratch: Scratch,
    reverse: bool,
) -> None:
    """Scan one block into ``y`` (T, H, P); ``state`` (G, N, R * P) is moved on in place."""
    groups, d_state, width = state.shape
    inputs = prepare(block, sequence, A, scratch, reverse)
    x, dt, B, C, decays = inputs
    chunks, size, heads, head_dim = x.shape[1:]
    entering = carry_states(inputs, state, scratch, reverse)
    # What the state before each chunk gives to its frames.
    result = scratch("weighted", groups * chunks, size, width)
    torch.bmm(C, entering.view(-1, d_state, width), out=result)
    result = result.view(x.shape).mul_(decays.into[..., None])
    # What the chunk's own frames give, head by head.
    weights = attention_weights(decays.coarse, triangles, scratch("weights", groups, chunks, heads, size, size))
    products = torch.bmm(C, B.transpose(1, 2), out=scratch("products", groups * chunks, size, size))
    weights.mul_(products.view(groups, chunks, 1, size, size))
    values = scratch("values", groups, chunks, heads, size, head_dim)
    torch.mul(x.transpose(2, 3), (dt * decays.inverse_fine).transpose(2, 3)[..., None], out=values)
    own = scratch("own", *values.shape)
    torch.bmm(weights.flatten(0, 2), values.flatten(0, 2), out=own.flatten(0, 2))
    own, fine = own.transpose(2, 3), decays.fine[..., None]
    if D is None:
        torch.addcmul(result, own, fine, out=block.of(y, groups))
    else:
        result.addcmul_(own, fine)
        torch.addcmul(result, x, D.to(x.dtype).view(groups, 1, 1, heads, 1), out=block.of(y, groups))
