"""The chunked SSD's backward pass over one sequence: block by block against the scan, everything else recomputed.

Per head, with frame i's output y_i = sum_j M_ij x_j + into_i S C_i + D x_i and weights M_ij = C_i B_j L_ij dt_j, the
gradients of x, B and C are products of the same shapes as the forward pass's. The log decay dt_t A of frame t takes
part in whatever crosses into t from before: pairs (i, j) on either side of that boundary within the chunk, the state
that came in, and what goes out into the next chunk. These are summed as they are. The shorter formula, the running sum
of y dy - x dx, cancels, and loses four digits.
"""

from functools import cache

import torch
from torch import Tensor

from cald_speech.ops.ssd.torch_block_steps import (
    Inputs,
    attention_weights,
    carry_gradients,
    carry_states,
    in_dtype,
    prepare,
)
from cald_speech.ops.ssd.torch_blocks import Block, Scratch, Sequence, Triangles, blocks


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
