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

from cald_speech.ops.ssd.torch_bad_frames import keep_from_earlier_frames
from cald_speech.ops.ssd.torch_batched import ssd_batched
from cald_speech.ops.ssd.torch_blocks import (
    CHUNK_SIZE,
    FRAMES_IN_CACHE,
    Block,
    Inputs,
    Scratch,
    Sequence,
    Triangles,
    attention_weights,
    blocks,
    carry_gradients,
    carry_states,
    from_layout,
    in_dtype,
    prepare,
    to_layout,
)
from cald_speech.ops.ssd.two_scans import bidirectional_by, pair_by

# Numbers in a sequence's x, up to which a batch is scanned at once: 500 frames of width 128 take as long either way.
SMALL_SEQUENCE = 2**16


def ssd_torch(x, dt, A, B, C, D, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.ssd`, which documents arguments and result."""
    whole_batch = x.size(0) > 1 and x[0].numel() <= SMALL_SEQUENCE
    options = {"lengths": lengths, "reverse": reverse, "initial_state": initial_state}
    options["chunk_size"] = chunk_size or CHUNK_SIZE
    y, state = keep_from_earlier_frames(ssd_batched if whole_batch else ssd_by_blocks, x, dt, A, B, C, D, **options)
    return (y, state) if return_final_state else y


def ssd_by_blocks(x, dt, A, B, C, D, *, lengths, reverse, initial_state, chunk_size):
    """y and the final state, sequence by sequence."""
    tensors = (x, dt, A, B, C, D, initial_state)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        return _ChunkedScan.apply(*tensors, lengths, reverse, chunk_size)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state, _ = ssd_into_torch(y, *tensors, lengths, reverse=reverse, chunk_size=chunk_size)
    return y, state


# On a CPU one matrix for both directions would save a tenth of the arithmetic: the states are what costs.
ssd_bidirectional_torch = bidirectional_by(ssd_torch)
ssd_pair_torch = pair_by(ssd_torch)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, lengths, reverse, chunk_size):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        state, entering = ssd_into_torch(
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


def ssd_into_torch(
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
    most_blocks = num_frames // max(1, FRAMES_IN_CACHE // chunk_size * chunk_size, chunk_size) + 2
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
    """Scan one block into ``y`` (T, H, P); ``state`` (G, N, R * P) is moved on in place.

    The steps have the numbers of the paper's listing 1, as in ``torch_batched.py``; here the states come first.
    """
    groups, d_state, width = state.shape
    inputs = prepare(block, sequence, A, scratch, reverse)
    x, dt, B, C, decays = inputs
    chunks, size, heads, head_dim = x.shape[1:]
    # 2. What each chunk adds to the state, and 3. the state before each chunk.
    entering = carry_states(inputs, state, scratch, reverse)
    # 4. What the state before each chunk gives to its frames.
    result = scratch("weighted", groups * chunks, size, width)
    torch.bmm(C, entering.view(-1, d_state, width), out=result)
    result = result.view(x.shape).mul_(decays.into[..., None])
    # 1. What the chunk's own frames give, head by head.
    weights = attention_weights(decays.coarse, triangles, scratch("weights", groups, chunks, heads, size, size))
    products = torch.bmm(C, B.transpose(1, 2), out=scratch("products", groups * chunks, size, size))
    # A product of large numbers may be infinite, and a decay of 0 would make NaN of it.
    products = products.triu_() if reverse else products.tril_()
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


def backward_sequence(
    sequence: Sequence,
    gradients: Sequence,
    dy: Tensor,
    dstate: Tensor,
    per_head: tuple[Tensor, Tensor | None, Tensor, Tensor],
    entering: Tensor,
    scratch: Scratch,
    *,
    reverse: bool,
    chunk_size: int,
) -> Tensor:
    """Fill ``gradients`` of one sequence and add to those of A and D; returns the initial state's, (G, N, R * P).

    Block by block against the scan, everything else recomputed. Per head, with frame i's output
    y_i = sum_j M_ij x_j + into_i S C_i + D x_i and weights M_ij = C_i B_j L_ij dt_j, the gradients of x, B and C are
    products of the same shapes as the forward pass's. The log decay dt_t A of frame t takes part in whatever crosses
    into t from before: pairs (i, j) on either side of that boundary within the chunk, the state that came in, and what
    goes out into the next chunk. These are summed as they are. The shorter formula, the running sum of y dy - x dx,
    cancels, and loses four digits.

    per_head : A, D and their gradients so far, float64 (H,). entering : the states before each block of the scan.
    """
    triangles = cache(lambda size: Triangles.make(size, reverse, entering))
    dstate = dstate.clone()
    scanned = list(enumerate(blocks(sequence.x.size(0), chunk_size, reverse=reverse)))
    for k, block in reversed(scanned):
        state = scratch("state", *dstate.shape).copy_(entering[k])
        _backward_block(
            block, sequence, gradients, dy, state, dstate, per_head, triangles(block.size), scratch, reverse
        )
    return dstate


def _backward_block(
    block: Block,
    sequence: Sequence,
    gradients: Sequence,
    dy: Tensor,
    state: Tensor,
    dstate: Tensor,
    per_head: tuple[Tensor, Tensor | None, Tensor, Tensor],
    triangles: Triangles,
    scratch: Scratch,
    reverse: bool,
) -> None:
    groups, d_state, width = state.shape
    A, D, dA, dD = per_head
    inputs = prepare(block, sequence, A, scratch, reverse)
    x, dt, B, C, decays = inputs
    dy = in_dtype(block.of(dy, groups), scratch, "dy")
    wide = (groups * x.size(1), x.size(2), width)
    entering = carry_states(inputs, state, scratch, reverse).view(-1, d_state, width)
    weighted = scratch("weighted", *wide)  # x dt, decayed to the end of the chunk: carry_states left it there
    received = torch.mul(dy, decays.into[..., None], out=scratch("received", *x.shape))
    leaving = carry_gradients(inputs, received, dstate, scratch, reverse).view(-1, d_state, width)

    # By way of the states. Of the two (Q, R) sums, each frame's share in what came in and in what goes out.
    wide_product = scratch("wide", *wide)
    dC = torch.bmm(received.view(wide), entering.transpose(1, 2))
    dB = torch.bmm(weighted, leaving.transpose(1, 2))
    came_in = torch.bmm(C, entering, out=wide_product).view(x.shape).mul_(received).sum(-1)
    went_through = entering.mul_(leaving).view(groups, -1, d_state, *x.shape[3:]).sum((2, 4))[:, :, None]
    went_through = went_through * decays.through
    dx = torch.bmm(B, leaving, out=wide_product).view(x.shape)
    ddt = torch.mul(x, dx, out=received).sum(-1).mul_(decays.out)
    goes_out = ddt * dt
    dx.mul_((dt * decays.out)[..., None])

    # Within the chunks.
    own, dM = _within_chunks(inputs, dy, dB, dC, triangles, scratch)
    dx.addcmul_(own.transpose(2, 3), (dt * decays.inverse_fine)[..., None])
    crossing, direct, diagonal = dM
    ddt += direct
    d_log_decay = crossing + triangles.at_or_after @ came_in + triangles.before @ goes_out + went_through
    ddt += d_log_decay * A.to(dt.dtype).view(groups, 1, 1, -1)
    dA += (d_log_decay * dt).sum((1, 2), dtype=torch.float64).flatten()
    if D is not None:
        dx.addcmul_(dy, D.to(x.dtype).view(groups, 1, 1, -1, 1))
        dD += diagonal.sum((1, 2), dtype=torch.float64).flatten()
    for gradient, result in zip(
        gradients, (dx, ddt, dB.view(*x.shape[:3], 1, -1), dC.view(*x.shape[:3], 1, -1)), strict=True
    ):
        block.of(gradient, groups).copy_(result)


def _within_chunks(
    inputs: Inputs, dy: Tensor, dB: Tensor, dC: Tensor, triangles: Triangles, scratch: Scratch
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Gradients by way of the pairs of frames in a chunk; adds to dB and dC, (G * chunks, Q, N).

    Returns the gradient of dt_j x_j but for inverse_fine, (G, chunks, R, Q, P), and three (G, chunks, Q, R): of each
    frame's log decay, of its dt as a weight, and x dy.
    """
    x, dt, B, C, decays = inputs
    groups, chunks, size, heads, head_dim = x.shape
    square = (groups, chunks, heads, size, size)
    weight = (dt * decays.inverse_fine).transpose(2, 3)
    decay = attention_weights(decays.coarse, triangles, scratch("weights", *square))
    products = torch.bmm(C, B.transpose(1, 2), out=scratch("products", groups * chunks, size, size))
    products = products.view(groups, chunks, 1, size, size)
    dy = torch.mul(
        dy.transpose(2, 3),
        decays.fine.transpose(2, 3)[..., None],
        out=scratch("dy by head", groups, chunks, heads, size, head_dim),
    )
    x = scratch("values", *dy.shape).copy_(x.transpose(2, 3))
    # dy_i x_j, of which the part at or before i counts.
    pairs = scratch("pairs", *square)
    torch.bmm(dy.flatten(0, 2), x.flatten(0, 2).transpose(1, 2), out=pairs.flatten(0, 2))
    diagonal = (pairs.diagonal(dim1=-2, dim2=-1).transpose(2, 3)) / decays.fine
    pairs.mul_(decay)
    decay.mul_(products)
    own = scratch("own", *dy.shape)
    torch.bmm(decay.flatten(0, 2).transpose(1, 2), dy.flatten(0, 2), out=own.flatten(0, 2))
    shares = torch.mul(pairs, products, out=decay)
    direct = (shares.sum(-2) * decays.inverse_fine.transpose(2, 3)).transpose(2, 3)
    # Pairs with i at or after frame t and j before it.
    after = scratch("after", *square)
    torch.bmm(
        triangles.at_or_after.expand(groups * chunks * heads, -1, -1), shares.flatten(0, 2), out=after.flatten(0, 2)
    )
    crossing = (after.mul_(triangles.before) @ weight[..., None])[..., 0].transpose(2, 3)
    dproducts = pairs.mul_(weight[..., None, :]).sum(2).flatten(0, 1)
    dC.baddbmm_(dproducts, B)
    dB.baddbmm_(dproducts.transpose(1, 2), C)
    return own, (crossing, direct, diagonal)
