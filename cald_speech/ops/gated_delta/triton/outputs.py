"""The output of each chunk: what its frames read of the state that enters it, and of what they wrote themselves."""

import triton
import triton.language as tl

from cald_speech.ops.gated_delta.triton.frames import frames_in_order, load_matrix
from cald_speech.ops.triton.tiles import locate, product, spoil_from, store_frames, without_bad


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def outputs_kernel(
    queries, matrix, entering, writes, y, lengths, num_frames: tl.int64, num_chunks: tl.int64,
    REVERSE: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, ALL_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y = queries S^T + matrix U``, zeros at padding, for some of the P channels of a head."""
    WORK: tl.constexpr = entering.dtype.element_ty
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    batch, chunk, unit = locate(tl.program_id(0).to(tl.int64), num_chunks, HEADS * BLOCKS)
    head, first = unit // BLOCKS, unit % BLOCKS * BLOCK_P
    cell = (batch * HEADS + head) * num_chunks + chunk
    frames, valid = frames_in_order(chunk, batch, lengths, num_frames, REVERSE, CHUNK)
    query = load_matrix(queries, cell, CHUNK, N, CHUNK, ALL_N)
    state = load_matrix(entering, cell, P, N, BLOCK_P, ALL_N, first)
    out = product(query, tl.trans(state), WORK, PRECISION)
    weights = load_matrix(matrix, cell, CHUNK, CHUNK, CHUNK, CHUNK)
    # What bad frames wrote is kept from those before them.
    write, bad = without_bad(load_matrix(writes, cell, CHUNK, P, CHUNK, BLOCK_P, first_column=first))
    out += spoil_from(product(weights, write, WORK, PRECISION), bad, True, False, CHUNK)
    out = tl.where(valid[:, None], out, 0.0)
    store_frames(y, out, batch, frames, num_frames, head, HEADS, P, BLOCK_P, first)
