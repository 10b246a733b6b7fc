"""The state carried from chunk to chunk, and its gradient carried back: one chunk after the other, for some rows of it.

Rows of a state, one for each value channel, do not mix.
"""

import triton
import triton.language as tl

from cald_speech.ops.gated_delta.triton.frames import frames_in_order, load_matrix, store_matrix
from cald_speech.ops.triton.tiles import load_frames, product


@triton.jit
def rows_of(HEADS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sequence, head, and first row of the state that a program carries."""
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0).to(tl.int64)
    rest = program // BLOCKS
    return rest // HEADS, rest % HEADS, program % BLOCKS * BLOCK_P


@triton.jit
def load_total(total, cell, N: tl.constexpr, ALL_N: tl.constexpr):
    """(1, ALL_N) decays over a chunk."""
    entry = tl.arange(0, ALL_N)
    return tl.load(total + cell * N + entry, mask=entry < N, other=0.0)[None, :]


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def states_kernel(
    keys, reads, offered, total, initial, entering, writes, final,
    lengths, num_frames: tl.int64, num_chunks: tl.int64,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    ALL_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``U = offered - reads S^T`` to writes, and ``S <- S Diag(total) + U^T keys``.

    initial, final : (B, H, P, N) float32, or None. entering : (B, H, chunks, P, N), S before each chunk.
    The sum is in float32 whatever dtype the states are kept in.
    """
    WORK: tl.constexpr = entering.dtype.element_ty
    batch, head, first = rows_of(HEADS, P, BLOCK_P)
    sequence = batch * HEADS + head
    state = tl.zeros((BLOCK_P, ALL_N), dtype=tl.float32)
    if initial is not None:
        state = load_matrix(initial, sequence, P, N, BLOCK_P, ALL_N, first)
    for chunk in range(num_chunks):
        cell = sequence * num_chunks + chunk
        store_matrix(entering, state, cell, P, N, BLOCK_P, ALL_N, first)
        read = load_matrix(reads, cell, CHUNK, N, CHUNK, ALL_N)
        write = load_matrix(offered, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=first).to(tl.float32)
        write -= product(read, tl.trans(state), WORK, PRECISION)
        store_matrix(writes, write, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=first)
        key = load_matrix(keys, cell, CHUNK, N, CHUNK, ALL_N)
        state = state * load_total(total, cell, N, ALL_N) + product(tl.trans(write), key, WORK, PRECISION)
    if final is not None:
        store_matrix(final, state, sequence, P, N, BLOCK_P, ALL_N, first)


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def states_gradient_kernel(
    dy, queries, keys, reads, matrix, total, dfinal, leaving, dwrites, dinitial,
    dy_strides, lengths, num_frames: tl.int64, num_chunks: tl.int64,
    REVERSE: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, ALL_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dU = matrix^T dy + keys dS^T``, and ``dS <- dS Diag(total) + dy^T queries - dU^T reads``, from the last chunk.

    dfinal, dinitial : (B, H, P, N) float32, or None. leaving : (B, H, chunks, P, N), dS of the state after each chunk.
    dwrites : (B, H, chunks, CHUNK, P), dU.
    """
    WORK: tl.constexpr = leaving.dtype.element_ty
    batch, head, first = rows_of(HEADS, P, BLOCK_P)
    sequence = batch * HEADS + head
    dstate = tl.zeros((BLOCK_P, ALL_N), dtype=tl.float32)
    if dfinal is not None:
        dstate = load_matrix(dfinal, sequence, P, N, BLOCK_P, ALL_N, first)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step
        cell = sequence * num_chunks + chunk
        store_matrix(leaving, dstate, cell, P, N, BLOCK_P, ALL_N, first)
        frames, valid = frames_in_order(chunk, batch, lengths, num_frames, REVERSE, CHUNK)
        dy_tile = load_frames(dy, dy_strides, batch, frames, head, valid, P, BLOCK_P, first)
        weights = load_matrix(matrix, cell, CHUNK, CHUNK, CHUNK, CHUNK)
        key = load_matrix(keys, cell, CHUNK, N, CHUNK, ALL_N)
        dwrite = product(tl.trans(weights), dy_tile, WORK, PRECISION)
        dwrite += product(key, tl.trans(dstate), WORK, PRECISION)
        store_matrix(dwrites, dwrite, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=first)
        query = load_matrix(queries, cell, CHUNK, N, CHUNK, ALL_N)
        read = load_matrix(reads, cell, CHUNK, N, CHUNK, ALL_N)
        dstate = dstate * load_total(total, cell, N, ALL_N)
        dstate += product(tl.trans(dy_tile), query, WORK, PRECISION)
        dstate -= product(tl.trans(dwrite), read, WORK, PRECISION)
    if dinitial is not None:
        store_matrix(dinitial, dstate, sequence, P, N, BLOCK_P, ALL_N, first)
