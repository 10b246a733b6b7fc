"""Gradients of each chunk, from what it read and wrote, and the states and their gradients on either side.

Two launches: pairs of frames, then queries, keys and decays. In one, the matrices over pairs that the second half uses
again and again fill the registers.
"""

import triton
import triton.language as tl

from cald_speech.ops.gated_delta.triton.frames import (
    chosen_sums,
    decays_of_a_head,
    decays_of_channels,
    finite_decays,
    frames_in_order,
    load_matrix,
    load_numbers,
    parted_at,
    store_matrix,
)
from cald_speech.ops.triton.tiles import load_frames, locate, product, store_frames


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def pairs_gradient_kernel(
    v, beta, g, dy, writes, dwrites, inverses, errors, dlower, dmatrix, dv, dbeta,
    v_strides, beta_strides, g_strides, dy_strides, lengths, num_frames: tl.int64, num_chunks: tl.int64,
    REVERSE: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk of a head, all (B, H, chunks, ...):

    errors (CHUNK, P) : E = T^T dU, the gradient of the right side of ``(I + L) U = diag(beta) (V - Ke S0^T)``.
    dlower, dmatrix (CHUNK, CHUNK) : gradients of L, -E U^T, and of ``matrix``, dy U^T, for s <= t; where a head has one
        decay, times that between the frames.

    And dv (B, T, H, P); dbeta (B, T, H), what comes through v alone.
    """
    WORK: tl.constexpr = errors.dtype.element_ty
    batch, chunk, head = locate(tl.program_id(0).to(tl.int64), num_chunks, HEADS)
    cell = (batch * HEADS + head) * num_chunks + chunk
    frames, valid = frames_in_order(chunk, batch, lengths, num_frames, REVERSE, CHUNK)
    strength = load_numbers(beta, beta_strides, batch, frames, head, valid)
    solve = tl.trans(load_matrix(inverses, cell, CHUNK, CHUNK, CHUNK, CHUNK))
    of_keys = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    of_queries = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    dstrength = tl.zeros((CHUNK,), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        dwrite = load_matrix(dwrites, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=first)
        error = tl.dot(solve, dwrite.to(tl.float32), input_precision=PRECISION)
        store_matrix(errors, error, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=first)
        v_tile = load_frames(v, v_strides, batch, frames, head, valid, P, BLOCK_P, first)
        dstrength += tl.sum(error * v_tile, axis=1)
        out = tl.where(valid[:, None], strength[:, None] * error, 0.0)
        store_frames(dv, out, batch, frames, num_frames, head, HEADS, P, BLOCK_P, first)
        write = tl.trans(load_matrix(writes, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=first))
        dy_tile = load_frames(dy, dy_strides, batch, frames, head, valid, P, BLOCK_P, first)
        of_keys -= product(error, write, WORK, PRECISION)
        of_queries += product(dy_tile, write, WORK, PRECISION)
    if not CHANNELS:
        log, _ = finite_decays(load_numbers(g, g_strides, batch, frames, head, valid))
        _, _, _, decay = decays_of_a_head(log, CHUNK)
        of_keys, of_queries = of_keys * decay, of_queries * decay
    index = tl.arange(0, CHUNK)
    row, column = index[:, None], index[None, :]
    store_matrix(dlower, tl.where(row > column, of_keys, 0.0), cell, CHUNK, CHUNK, CHUNK, CHUNK)
    store_matrix(dmatrix, tl.where(row >= column, of_queries, 0.0), cell, CHUNK, CHUNK, CHUNK, CHUNK)
    at = (batch * num_frames + frames) * HEADS + head
    tl.store(dbeta + at, tl.where(valid, dstrength, 0.0), mask=frames < num_frames)


@triton.jit
def through_pairs(q, k, strength, of_keys, of_queries, PRECISION: tl.constexpr):
    """What each frame gets from others, (CHUNK, BLOCK_N): the later key (without its beta), the query, the earlier key.

    of_keys, of_queries : gradients of pairs, decays included.
    """
    dlater = tl.dot(of_keys, k, input_precision=PRECISION)
    dquery = tl.dot(of_queries, k, input_precision=PRECISION)
    dearlier = tl.dot(tl.trans(strength[:, None] * of_keys), k, input_precision=PRECISION)
    dearlier += tl.dot(tl.trans(of_queries), q, input_precision=PRECISION)
    return dlater, dquery, dearlier


@triton.jit
def through_pairs_of_channels(
    q, k, g, strength, of_keys, of_queries, LEVELS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The same, level by level, as ``channel_products`` made the pairs."""
    dlater = tl.zeros((CHUNK, BLOCK_N), dtype=tl.float32)
    dquery = tl.zeros((CHUNK, BLOCK_N), dtype=tl.float32)
    dearlier = tl.zeros((CHUNK, BLOCK_N), dtype=tl.float32)
    for level in range(LEVELS):
        parted, between = parted_at(level, CHUNK)
        decay = tl.exp(chosen_sums(between, g, SUMS))
        later, query, earlier = through_pairs(
            q * decay, k * decay, strength, tl.where(parted, of_keys, 0.0), tl.where(parted, of_queries, 0.0), PRECISION
        )
        dlater += decay * later
        dquery += decay * query
        dearlier += decay * earlier
    return dlater, dquery, dearlier


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def keys_gradient_kernel(
    q, k, beta, g, dy, writes, errors, dlower, dmatrix, entering, leaving, dq, dk, dbeta, dg,
    q_strides, k_strides, beta_strides, g_strides, dy_strides,
    lengths, num_frames: tl.int64, num_chunks: tl.int64,
    REVERSE: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Of some channels of the keys: dq, dk (B, T, H, N), of each head alone; dg (B, T, H, N), or their part of
    dg (B, T, H, blocks); their part of dbeta (B, T, H, blocks), what comes through k.

    entering : the state before the chunk; leaving : the gradient of the state after it, (B, H, chunks, P, N) each.

    A decay scales what flows across its frame's boundary, and its gradient is that flow: what enters the chunk and is
    read later, what was written earlier and leaves it, what pairs on either side exchange, and what goes through. No
    decay scales a frame's pair with itself: in the difference of flows it would cancel, but for its rounding.
    """
    WORK: tl.constexpr = entering.dtype.element_ty
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    batch, chunk, unit = locate(tl.program_id(0).to(tl.int64), num_chunks, HEADS * BLOCKS)
    head, block = unit // BLOCKS, unit % BLOCKS
    first, group = block * BLOCK_N, head // PER_GROUP
    cell = (batch * HEADS + head) * num_chunks + chunk
    frames, valid = frames_in_order(chunk, batch, lengths, num_frames, REVERSE, CHUNK)
    # 1. Through the states on either side.
    dquery_in = tl.zeros((CHUNK, BLOCK_N), dtype=tl.float32)
    dkey_in = tl.zeros((CHUNK, BLOCK_N), dtype=tl.float32)
    dkey_out = tl.zeros((CHUNK, BLOCK_N), dtype=tl.float32)
    kept = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for value in range(0, P, BLOCK_P):
        state = load_matrix(entering, cell, P, N, BLOCK_P, BLOCK_N, value, first)
        dy_tile = load_frames(dy, dy_strides, batch, frames, head, valid, P, BLOCK_P, value)
        dquery_in += product(dy_tile, state, WORK, PRECISION)
        error = load_matrix(errors, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=value)
        dkey_in -= product(error, state, WORK, PRECISION)
        dstate = load_matrix(leaving, cell, P, N, BLOCK_P, BLOCK_N, value, first)
        write = load_matrix(writes, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=value)
        dkey_out += product(write, dstate, WORK, PRECISION)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=0)
    # 2. From frame to frame.
    q_tile = load_frames(q, q_strides, batch, frames, group, valid, N, BLOCK_N, first).to(tl.float32)
    k_tile = load_frames(k, k_strides, batch, frames, group, valid, N, BLOCK_N, first).to(tl.float32)
    strength = load_numbers(beta, beta_strides, batch, frames, head, valid)
    index = tl.arange(0, CHUNK)
    row, column = index[:, None], index[None, :]
    of_keys = load_matrix(dlower, cell, CHUNK, CHUNK, CHUNK, CHUNK)
    of_queries = load_matrix(dmatrix, cell, CHUNK, CHUNK, CHUNK, CHUNK)
    itself = tl.sum(tl.where(row == column, of_queries, 0.0), axis=1)[:, None]
    of_queries = tl.where(row == column, 0.0, of_queries)
    if CHANNELS:
        log, _ = finite_decays(load_frames(g, g_strides, batch, frames, head, valid, N, BLOCK_N, first))
        since_entry, to_exit, over_all = decays_of_channels(log, CHUNK, SUMS)
        dlater, dquery, dearlier = through_pairs_of_channels(
            q_tile, k_tile, log, strength, of_keys, of_queries, LEVELS, CHUNK, BLOCK_N, PRECISION, SUMS
        )
        # Later less earlier: summed from a frame on, pairs on one side of it cancel.
        flow = q_tile * dquery + strength[:, None] * k_tile * dlater - k_tile * dearlier
    else:
        log, _ = finite_decays(load_numbers(g, g_strides, batch, frames, head, valid))
        since_entry, to_exit, over_all, _ = decays_of_a_head(log, CHUNK)
        dlater, dquery, dearlier = through_pairs(q_tile, k_tile, strength, of_keys, of_queries, PRECISION)
        earlier = tl.trans(k_tile)
        pairs = strength[:, None] * of_keys * tl.dot(k_tile, earlier, input_precision=PRECISION)
        pairs += of_queries * tl.dot(q_tile, earlier, input_precision=PRECISION)
    dquery_in *= since_entry
    dkey_in *= since_entry
    dkey_out *= to_exit
    dlater += dkey_in
    out = tl.where(valid[:, None], dquery + dquery_in + itself * k_tile, 0.0)
    store_frames(dq, out, batch, frames, num_frames, head, HEADS, N, BLOCK_N, first)
    out = tl.where(valid[:, None], strength[:, None] * dlater + dearlier + dkey_out + itself * q_tile, 0.0)
    store_frames(dk, out, batch, frames, num_frames, head, HEADS, N, BLOCK_N, first)
    at = ((batch * num_frames + frames) * HEADS + head) * BLOCKS + block
    dstrength = tl.sum(k_tile * dlater, axis=1)
    tl.store(dbeta + at, tl.where(valid, dstrength, 0.0), mask=frames < num_frames)
    # 3. Across each frame's boundary.
    entered = q_tile * dquery_in + strength[:, None] * k_tile * dkey_in
    left = k_tile * dkey_out
    kept *= over_all
    if CHANNELS:
        across = chosen_sums(row <= column, entered + flow, SUMS) + chosen_sums(row > column, left, SUMS)
        across = tl.where(valid[:, None], across + kept[None, :], 0.0)
        store_frames(dg, across, batch, frames, num_frames, head, HEADS, N, BLOCK_N, first)
    else:
        entered = tl.sum(entered, axis=1) + tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
        across = tl.where(row <= column, entered[None, :], tl.sum(left, axis=1)[None, :])
        across = tl.sum(across, axis=1) + tl.sum(kept, axis=0)
        tl.store(dg + at, tl.where(valid, across, 0.0), mask=frames < num_frames)
