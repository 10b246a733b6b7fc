"""Gradients of one chunk for B and C, which the heads of a group share."""

import triton
import triton.language as tl

from cald_speech.ops.ssd.triton.tiles import decay_to_exit, frames_of, load_decays, pair_decays, run, state_tile
from cald_speech.ops.triton.tiles import load_frames, locate, product, store_frames


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def maps_gradient_kernel(
    tensors, strides, lengths, num_frames: tl.int64, num_chunks: tl.int64,
    PAIR: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, HEADS: tl.constexpr, PER_GROUP: tl.constexpr,
    SPLITS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    run(
        chunk_maps_gradient, tensors, strides, PAIR, PAST, FUTURE,
        (lengths, num_frames, num_chunks, HEADS, PER_GROUP, SPLITS, P, N, CHUNK, BLOCK_P, BLOCK_N, PRECISION),
    )  # fmt: skip


@triton.jit
def chunk_maps_gradient(
    program, PAST: tl.constexpr, FUTURE: tl.constexpr, x, dy, B, C, decays, entering, leaving, dB, dC,
    x_strides, dy_strides, B_strides, C_strides, lengths, num_frames, num_chunks,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, SPLITS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB, dC (B, T, G, SPLITS, N), a block of N at a time: summed over a group's heads, or one of SPLITS equal parts.

    The (chunk, chunk) matrix is summed over the heads before it meets B and C.
    """
    DIRECTIONS: tl.constexpr = PAST + FUTURE
    WORK: tl.constexpr = entering.dtype.element_ty
    UNITS: tl.constexpr = HEADS // PER_GROUP * SPLITS
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    batch, chunk, unit = locate(program, num_chunks, UNITS * BLOCKS)
    first, unit = unit % BLOCKS * BLOCK_N, unit // BLOCKS
    frames, valid = frames_of(chunk, batch, lengths, num_frames, CHUNK)
    offsets, inside = state_tile(P, N, BLOCK_P, BLOCK_N, first)
    dmatrix = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    dB_tile = tl.zeros((CHUNK, BLOCK_N), dtype=tl.float32)
    dC_tile = tl.zeros((CHUNK, BLOCK_N), dtype=tl.float32)
    for index in range(PER_GROUP // SPLITS):
        head = unit * (PER_GROUP // SPLITS) + index
        cell = (batch * HEADS + head) * num_chunks + chunk
        x_tile = load_frames(x, x_strides, batch, frames, head, valid, P, BLOCK_P)
        dy_tile = load_frames(dy, dy_strides, batch, frames, head, valid, P, BLOCK_P)
        decay, pair_step = pair_decays(decays, cell, PAST, FUTURE, CHUNK, SOURCES_FIRST=True)
        dmatrix += decay * pair_step * tl.dot(x_tile, tl.trans(dy_tile), input_precision=PRECISION)
        for direction in tl.static_range(DIRECTIONS):
            coarse, rest, step = load_decays(decays, cell, direction, DIRECTIONS, CHUNK)
            at = (cell * DIRECTIONS + direction) * (P * N) + offsets
            state = tl.load(entering + at, mask=inside, other=0.0)
            dC_tile += tl.exp2(coarse + rest)[:, None] * product(dy_tile, state, WORK, PRECISION)
            dstate = tl.load(leaving + at, mask=inside, other=0.0)
            step *= decay_to_exit(decays, cell, direction, coarse, rest, direction >= PAST, DIRECTIONS, CHUNK)
            dB_tile += step[:, None] * product(x_tile, dstate, WORK, PRECISION)
    group = unit // SPLITS
    B_tile = load_frames(B, B_strides, batch, frames, group, valid, N, BLOCK_N, first)
    C_tile = load_frames(C, C_strides, batch, frames, group, valid, N, BLOCK_N, first)
    dB_tile += product(dmatrix, C_tile, WORK, PRECISION)
    dC_tile += product(tl.trans(dmatrix), B_tile, WORK, PRECISION)
    store_frames(dB, dB_tile, batch, frames, num_frames, unit, UNITS, N, BLOCK_N, first)
    store_frames(dC, dC_tile, batch, frames, num_frames, unit, UNITS, N, BLOCK_N, first)
