"""The output of each chunk: its own frames as one masked, decayed attention matrix, and the states that enter it."""

import triton
import triton.language as tl

from cald_speech.ops.ssd.triton.tiles import frames_of, load_decays, pair_decays, run, state_tile, where_linked
from cald_speech.ops.triton.tiles import load_frames, locate, product, spoil_from, store_frames, without_bad


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def outputs_kernel(
    tensors, strides, lengths, num_frames: tl.int64, num_chunks: tl.int64,
    PAIR: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, HEADS: tl.constexpr, PER_GROUP: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    run(
        chunk_outputs, tensors, strides, PAIR, PAST, FUTURE,
        (lengths, num_frames, num_chunks, HEADS, PER_GROUP, P, N, CHUNK, BLOCK_P, BLOCK_N, PRECISION),
    )  # fmt: skip


@triton.jit
def chunk_outputs(
    program, PAST: tl.constexpr, FUTURE: tl.constexpr, x, B, C, D, decays, entering, y, x_strides, B_strides, C_strides,
    lengths, num_frames, num_chunks,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y_i = sum_j (C_i B_j) decay_ij dt_j x_j + sum over directions decay_i S C_i + D x_i``, zeros at padding.

    C B^T, of two inputs, is a product in their dtype. Its decayed form and the states are rounded to the states' dtype;
    the decay of the entering state is applied in float32, after the product.
    """
    DIRECTIONS: tl.constexpr = PAST + FUTURE
    WORK: tl.constexpr = entering.dtype.element_ty
    batch, chunk, head = locate(program, num_chunks, HEADS)
    group = head // PER_GROUP
    cell = (batch * HEADS + head) * num_chunks + chunk
    frames, valid = frames_of(chunk, batch, lengths, num_frames, CHUNK)
    B_tile = load_frames(B, B_strides, batch, frames, group, valid, N, BLOCK_N)
    C_tile = load_frames(C, C_strides, batch, frames, group, valid, N, BLOCK_N)
    matrix = tl.dot(C_tile, tl.trans(B_tile), input_precision=PRECISION)
    decay, step = pair_decays(decays, cell, PAST, FUTURE, CHUNK, SOURCES_FIRST=False)
    x_tile = load_frames(x, x_strides, batch, frames, head, valid, P, BLOCK_P)
    weights = where_linked(matrix * decay * step, PAST, FUTURE, CHUNK, SOURCES_FIRST=False)
    if DIRECTIONS == 1:
        # A bad frame is kept from those before it; in both directions there are none.
        clean, bad = without_bad(x_tile)
        out = spoil_from(product(weights, clean, WORK, PRECISION), bad, PAST, FUTURE, CHUNK)
    else:
        out = product(weights, x_tile, WORK, PRECISION)
    offsets, inside = state_tile(P, N, BLOCK_P, BLOCK_N)
    for direction in tl.static_range(DIRECTIONS):
        state = tl.load(entering + (cell * DIRECTIONS + direction) * (P * N) + offsets, mask=inside, other=0.0)
        coarse, rest, _ = load_decays(decays, cell, direction, DIRECTIONS, CHUNK)
        out += tl.exp2(coarse + rest)[:, None] * product(C_tile, tl.trans(state), WORK, PRECISION)
    if D is not None:
        out += tl.load(D + head) * x_tile.to(tl.float32)
    out = tl.where(valid[:, None], out, 0.0)  # a bad frame's state, times the zeros of the padding, is NaN
    store_frames(y, out, batch, frames, num_frames, head, HEADS, P, BLOCK_P)
