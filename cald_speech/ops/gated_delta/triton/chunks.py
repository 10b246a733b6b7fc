"""What belongs to one chunk alone: its decayed queries and keys, and the form that Yang et al. call WY.

What the delta rule writes at frame t is ``u_t = beta_t (v_t - S' k_t)``, with the decayed state S' before it, which
holds what the chunk's earlier frames wrote. Over a chunk that is a triangular system (arXiv 2412.06464, eq. 5 to 8)

    (I + L) U = diag(beta) (V - Ke S0^T),    L_ts = beta_t sum_n k_tn k_sn decay_tsn for s < t,

where Ke are the keys decayed since the chunk's entry, and S0 is the state there. With T = (I + L)^-1 its solution is
``U = T diag(beta) V - W S0^T``, ``W = T diag(beta) Ke``: all but the product with S0 is worked out here, for all chunks
at once.
"""

import triton
import triton.language as tl

from cald_speech.ops.gated_delta.triton.frames import (
    chosen_sums,
    decays_of_a_head,
    decays_of_channels,
    finite_decays,
    frames_in_order,
    load_numbers,
    parted_at,
    store_matrix,
)
from cald_speech.ops.triton.tiles import load_frames, locate, spoil_from, without_bad


@triton.jit
def inverse(lower, LEVELS: tl.constexpr, CHUNK: tl.constexpr, SUMS: tl.constexpr):
    """(I + lower)^-1 for a strictly lower triangular tile, and the rows that were not finite.

    The inverse of the halves on the diagonal, T1 and T2, gives that of the whole, whose lower left is ``-T2 L21 T1``;
    so for all blocks of a size at once. It solves by substitution, only in blocks: series in powers of L are fewer
    products, but where neighbouring keys are alike, as those of speech are, their terms reach 10^8 and cancel.
    """
    index = tl.arange(0, CHUNK)
    found = tl.where(index[:, None] == index[None, :], 1.0, 0.0)
    lower, bad = without_bad(lower)
    for level in range(LEVELS):
        parted, _ = parted_at(level, CHUNK)
        step = tl.dot(found, tl.where(parted, lower, 0.0), input_precision=SUMS)
        found -= tl.dot(step, found, input_precision=SUMS)
        # What overflows keeps to its row: times the zeros of rows before it, it would be NaN there.
        found, overflown = without_bad(found)
        bad = bad | overflown
    return found, any_in_row(bad)


@triton.jit
def any_in_row(bad):
    return tl.max(bad.to(tl.int32), axis=1) > 0


@triton.jit
def channel_products(
    of_keys, of_queries, q, k, g, LEVELS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Adds ``sum_n k_tn k_sn decay_tsn`` for s < t, and the same of q_t, over a block of the channels.

    A decay between two frames is the product of those to the middle that parts them and from there on. Both are at
    most 1, so that each level is a product of matrices in which nothing can overflow.
    """
    for level in range(LEVELS):
        parted, between = parted_at(level, CHUNK)
        decay = tl.exp(chosen_sums(between, g, SUMS))
        decayed = k * decay
        earlier = tl.trans(decayed)
        of_keys += tl.where(parted, tl.dot(decayed, earlier, input_precision=PRECISION), 0.0)
        of_queries += tl.where(parted, tl.dot(q * decay, earlier, input_precision=PRECISION), 0.0)
    return of_keys, of_queries


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def chunks_kernel(
    q, k, v, beta, g, queries, keys, reads, offered, matrix, total, inverses,
    q_strides, k_strides, v_strides, beta_strides, g_strides, lengths, num_frames: tl.int64, num_chunks: tl.int64,
    REVERSE: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """For each chunk of a head, all (B, H, chunks, ...), frames in the order of the scan:

    queries, keys (CHUNK, N) : q decayed since the chunk's entry, k up to its exit.
    reads (CHUNK, N) : W, and offered (CHUNK, P) : U for a state of zeros.
    matrix (CHUNK, CHUNK) : ``sum_n q_tn k_sn decay_tsn`` for s <= t, what frame t reads of what frame s wrote.
    total (N) : the decay over the chunk.
    inverses (CHUNK, CHUNK) : T, for the backward pass; or None.

    A bad frame is taken out, and spoils what it and later ones write: times the zeros of frames before it, it would be
    NaN there. So is what overflows. A bad query spoils nothing but its own frame's output.
    """
    batch, chunk, head = locate(tl.program_id(0).to(tl.int64), num_chunks, HEADS)
    cell = (batch * HEADS + head) * num_chunks + chunk
    frames, valid = frames_in_order(chunk, batch, lengths, num_frames, REVERSE, CHUNK)
    group = head // PER_GROUP
    index = tl.arange(0, CHUNK)
    row, column = index[:, None], index[None, :]
    strength, bad = without_bad(load_numbers(beta, beta_strides, batch, frames, head, valid))
    if not CHANNELS:
        log, bad_g = finite_decays(load_numbers(g, g_strides, batch, frames, head, valid))
        bad = bad | bad_g
        since_entry, to_exit, over_all, decay = decays_of_a_head(log, CHUNK)
    # 1. Between frames, some channels of the keys at a time.
    of_keys = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    of_queries = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        q_tile = load_frames(q, q_strides, batch, frames, group, valid, N, BLOCK_N, first)
        k_tile, bad_k = without_bad(load_frames(k, k_strides, batch, frames, group, valid, N, BLOCK_N, first))
        bad = bad | any_in_row(bad_k)
        if CHANNELS:
            log, bad_g = finite_decays(load_frames(g, g_strides, batch, frames, head, valid, N, BLOCK_N, first))
            bad = bad | any_in_row(bad_g)
            q_float, k_float = q_tile.to(tl.float32), k_tile.to(tl.float32)
            itself = tl.sum(q_float * k_float, axis=1)
            of_queries += tl.where(row == column, itself[:, None], 0.0)
            of_keys, of_queries = channel_products(
                of_keys, of_queries, q_float, k_float, log, LEVELS, CHUNK, PRECISION, SUMS
            )
        else:
            of_keys += tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
            of_queries += tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    if not CHANNELS:
        of_keys, of_queries = (
            tl.where(row > column, of_keys * decay, 0.0),
            tl.where(row >= column, of_queries * decay, 0.0),
        )
    store_matrix(matrix, of_queries, cell, CHUNK, CHUNK, CHUNK, CHUNK)
    solve, overflown = inverse(strength[:, None] * of_keys, LEVELS, CHUNK, SUMS)
    bad = bad | overflown
    if inverses is not None:
        store_matrix(inverses, solve, cell, CHUNK, CHUNK, CHUNK, CHUNK)
    # 2. From the entry and to the exit.
    for first in range(0, N, BLOCK_N):
        q_tile = load_frames(q, q_strides, batch, frames, group, valid, N, BLOCK_N, first)
        k_tile, _ = without_bad(load_frames(k, k_strides, batch, frames, group, valid, N, BLOCK_N, first))
        if CHANNELS:
            log, _ = finite_decays(load_frames(g, g_strides, batch, frames, head, valid, N, BLOCK_N, first))
            since_entry, to_exit, over_all = decays_of_channels(log, CHUNK, SUMS)
        store_matrix(queries, q_tile * since_entry, cell, CHUNK, N, CHUNK, BLOCK_N, first_column=first)
        store_matrix(keys, k_tile * to_exit, cell, CHUNK, N, CHUNK, BLOCK_N, first_column=first)
        read, too_large = without_bad(strength[:, None] * since_entry * k_tile)
        bad = bad | any_in_row(too_large)
        read = tl.dot(solve, read, input_precision=PRECISION)
        store_matrix(reads, read, cell, CHUNK, N, CHUNK, BLOCK_N, first_column=first)
        entry = first + tl.arange(0, BLOCK_N)
        tl.store(total + cell * N + entry, tl.zeros((BLOCK_N,), dtype=tl.float32) + over_all, mask=entry < N)
    # 3. What is written.
    for first in range(0, P, BLOCK_P):
        v_tile = load_frames(v, v_strides, batch, frames, head, valid, P, BLOCK_P, first)
        write, bad_v = without_bad(strength[:, None] * v_tile)
        write = tl.dot(solve, write, input_precision=PRECISION)
        write = spoil_from(write, bad_v | bad[:, None], True, False, CHUNK)
        store_matrix(offered, write, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=first)
