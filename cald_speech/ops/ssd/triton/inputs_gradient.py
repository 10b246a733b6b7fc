"""Gradients of one chunk that belong to a head, from one load of x, dy, B and C and the states on either side."""

import triton
import triton.language as tl

from cald_speech.ops.ssd.triton.tiles import (
    decay_to_exit,
    frames_of,
    load_decays,
    load_total,
    pair_decays,
    run,
    state_tile,
)
from cald_speech.ops.triton.tiles import load_frames, locate, product, store_frames


@triton.jit
def state_gradients(
    x_tile, dy_tile, B_tile, C_tile, decays, entering, leaving, cell,
    direction: tl.constexpr, FUTURE: tl.constexpr, DIRECTIONS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one direction: the part of dx that goes through the state, and what flows in with it, out with it and through.

    In: from the entering state to each frame's output. Out: from each frame (without its dt) to the leaving state.
    """
    WORK: tl.constexpr = entering.dtype.element_ty
    coarse, rest, step = load_decays(decays, cell, direction, DIRECTIONS, CHUNK)
    offsets, inside = state_tile(P, N, BLOCK_P, BLOCK_N)
    at = (cell * DIRECTIONS + direction) * (P * N) + offsets
    state = tl.load(entering + at, mask=inside, other=0.0)
    dstate = tl.load(leaving + at, mask=inside, other=0.0)
    total, total_rest = load_total(decays, cell, direction, FUTURE, DIRECTIONS, CHUNK)
    through = tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1), axis=0)
    read = product(C_tile, tl.trans(state), WORK, PRECISION)
    inflow = tl.exp2(coarse + rest) * tl.sum(read * dy_tile.to(tl.float32), axis=1)
    to_exit = decay_to_exit(decays, cell, direction, coarse, rest, FUTURE, DIRECTIONS, CHUNK)
    written = to_exit[:, None] * product(B_tile, tl.trans(dstate), WORK, PRECISION)
    outflow = tl.sum(written * x_tile.to(tl.float32), axis=1)
    return step[:, None] * written, inflow, outflow, tl.exp2(total + total_rest) * through


@triton.jit
def step_gradient(
    flow, inflow, outflow, through, A, decays, cell,
    direction: tl.constexpr, FUTURE: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradient of one direction's dt for each frame, and the chunk's part of that of A.

    What flows across a frame's boundary is what its decay scales: pairs on either side, ``flow`` [source, target] times
    the source's dt; inflow read later; outflow put in earlier, times dt; and what goes through. All are sums: the
    shorter way, ``y dy - x dx``, is a difference of large numbers.
    """
    _, _, step = load_decays(decays, cell, direction, DIRECTIONS, CHUNK)
    index = tl.arange(0, CHUNK)
    # sums[source, t]: flow from a source to all targets scanned at t or later.
    sums = tl.cumsum(flow, axis=1, reverse=not FUTURE)
    ahead = index[None, :] - index[:, None]
    if FUTURE:
        ahead = -ahead
    across = tl.sum(tl.where(ahead > 0, step[:, None] * (sums + outflow[:, None]), 0.0), axis=0)
    across += tl.cumsum(inflow, axis=0, reverse=not FUTURE) + through
    dstep = tl.sum(tl.where(ahead == 0, sums, 0.0), axis=0) + outflow + tl.load(A) * across
    return dstep, tl.sum(across * step, axis=0)


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def inputs_gradient_kernel(
    tensors, strides, lengths, num_frames: tl.int64, num_chunks: tl.int64,
    PAIR: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, HEADS: tl.constexpr, PER_GROUP: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    run(
        chunk_inputs_gradient, tensors, strides, PAIR, PAST, FUTURE,
        (lengths, num_frames, num_chunks, HEADS, PER_GROUP, P, N, CHUNK, BLOCK_P, BLOCK_N, PRECISION),
    )  # fmt: skip


@triton.jit
def chunk_inputs_gradient(
    program, PAST: tl.constexpr, FUTURE: tl.constexpr, x, dy, A, B, C, D, decays, entering, leaving, dx, ddt, dA, dD,
    x_strides, dy_strides, B_strides, C_strides, lengths, num_frames, num_chunks,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients that belong to one head: dx (B, T, H, P), ddt (B, T, K, H), dA (B, chunks, K, H), dD (B, chunks, H).

    entering : the state before the chunk; leaving : the gradient of the state after it; (B, H, chunks, K, P, N) each.
    Tiles over two frames are [source, target], so that dx needs no transpose.
    """
    DIRECTIONS: tl.constexpr = PAST + FUTURE
    batch, chunk, head = locate(program, num_chunks, HEADS)
    cell = (batch * HEADS + head) * num_chunks + chunk
    frames, valid = frames_of(chunk, batch, lengths, num_frames, CHUNK)
    B_tile = load_frames(B, B_strides, batch, frames, head // PER_GROUP, valid, N, BLOCK_N)
    C_tile = load_frames(C, C_strides, batch, frames, head // PER_GROUP, valid, N, BLOCK_N)
    x_tile = load_frames(x, x_strides, batch, frames, head, valid, P, BLOCK_P)
    dy_tile = load_frames(dy, dy_strides, batch, frames, head, valid, P, BLOCK_P)
    dx_tile = tl.zeros((CHUNK, BLOCK_P), dtype=tl.float32)
    if D is not None:
        dx_tile += tl.load(D + head) * dy_tile.to(tl.float32)
        products = tl.sum(tl.sum(dy_tile.to(tl.float32) * x_tile.to(tl.float32), axis=1), axis=0)
        tl.store(dD + (batch * num_chunks + chunk) * HEADS + head, products)
    tiles = (x_tile, dy_tile, B_tile, C_tile)
    if PAST:
        part, in_past, out_past, through_past = state_gradients(
            *tiles, decays, entering, leaving, cell, 0, False, DIRECTIONS, P, N, CHUNK, BLOCK_P, BLOCK_N, PRECISION
        )
        dx_tile += part
    if FUTURE:
        part, in_future, out_future, through_future = state_gradients(
            *tiles, decays, entering, leaving, cell, PAST, True, DIRECTIONS, P, N, CHUNK, BLOCK_P, BLOCK_N, PRECISION
        )
        dx_tile += part
    decay, pair_step = pair_decays(decays, cell, PAST, FUTURE, CHUNK, SOURCES_FIRST=True)
    matrix = decay * tl.dot(B_tile, tl.trans(C_tile), input_precision=PRECISION)
    flow = matrix * tl.dot(x_tile, tl.trans(dy_tile), input_precision=PRECISION)
    dx_tile += product(matrix * pair_step, dy_tile, entering.dtype.element_ty, PRECISION)
    store_frames(dx, dx_tile, batch, frames, num_frames, head, HEADS, P, BLOCK_P)
    row = (batch * num_frames + frames) * DIRECTIONS
    part = (batch * num_chunks + chunk) * DIRECTIONS
    if PAST:
        dstep, across = step_gradient(
            flow, in_past, out_past, through_past, A + head, decays, cell, 0, False, DIRECTIONS, CHUNK
        )
        tl.store(ddt + row * HEADS + head, tl.where(valid, dstep, 0.0), mask=frames < num_frames)
        tl.store(dA + part * HEADS + head, across)
    if FUTURE:
        dstep, across = step_gradient(
            flow,
            in_future,
            out_future,
            through_future,
            A + PAST * HEADS + head,
            decays,
            cell,
            PAST,
            True,
            DIRECTIONS,
            CHUNK,
        )
        tl.store(ddt + (row + PAST) * HEADS + head, tl.where(valid, dstep, 0.0), mask=frames < num_frames)
        tl.store(dA + (part + PAST) * HEADS + head, across)
