"""What each chunk adds to the state, and the state carried from chunk to chunk; both serve the gradient as well.

The gradient of the states obeys the same recurrence the other way round, with (dy, C) in the place of (x, B).
"""

import triton
import triton.language as tl

from cald_speech.ops.ssd.triton.tiles import decay_to_exit, frames_of, load_decays, run, state_tile
from cald_speech.ops.triton.tiles import load_frames, locate, product, spoil_from, without_bad


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def states_kernel(
    tensors, strides, lengths, num_frames: tl.int64, num_chunks: tl.int64,
    PAIR: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, HEADS: tl.constexpr, PER_GROUP: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, GRADIENT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    run(
        chunk_states, tensors, strides, PAIR, PAST, FUTURE,
        (lengths, num_frames, num_chunks, HEADS, PER_GROUP, P, N, GRADIENT, CHUNK, BLOCK_P, BLOCK_N, PRECISION),
    )  # fmt: skip


@triton.jit
def chunk_states(
    program, PAST: tl.constexpr, FUTURE: tl.constexpr, x, B, decays, added, x_strides, B_strides,
    lengths, num_frames, num_chunks,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """added (B, H, chunks, K, P, N): ``sum_j w_j x_j B_j^T`` over a chunk, for each direction from one load of x and B.

    The weight is dt and the decay to the chunk's exit or, for ``GRADIENT``, the decay from its entry. It is applied in
    float32 before x is rounded to the dtype of the product.
    """
    DIRECTIONS: tl.constexpr = PAST + FUTURE
    batch, chunk, head = locate(program, num_chunks, HEADS)
    cell = (batch * HEADS + head) * num_chunks + chunk
    frames, valid = frames_of(chunk, batch, lengths, num_frames, CHUNK)
    x_tile = load_frames(x, x_strides, batch, frames, head, valid, P, BLOCK_P).to(tl.float32)
    B_tile = load_frames(B, B_strides, batch, frames, head // PER_GROUP, valid, N, BLOCK_N)
    offsets, inside = state_tile(P, N, BLOCK_P, BLOCK_N)
    for direction in tl.static_range(DIRECTIONS):
        coarse, rest, step = load_decays(decays, cell, direction, DIRECTIONS, CHUNK)
        if GRADIENT:
            weight = tl.exp2(coarse + rest)
        else:
            weight = step * decay_to_exit(decays, cell, direction, coarse, rest, direction >= PAST, DIRECTIONS, CHUNK)
        sums = product(tl.trans(x_tile * weight[:, None]), B_tile, added.dtype.element_ty, PRECISION)
        at = added + (cell * DIRECTIONS + direction) * (P * N) + offsets
        tl.store(at, sums.to(added.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_chunks"])
def carry_kernel(
    tensors, num_chunks: tl.int64,
    PAIR: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, SIZE: tl.constexpr, GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run(
        carry_states, tensors, ((), ()), PAIR, PAST, FUTURE,
        (num_chunks, SIZE, GRADIENT, CHUNK, STEPS, BLOCK, PRECISION, STAGES),
    )  # fmt: skip


@triton.jit
def carry_states(
    program, PAST: tl.constexpr, FUTURE: tl.constexpr, added, decays, initial, entering, final, num_chunks,
    SIZE: tl.constexpr, GRADIENT: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``S <- exp(total) S + added`` over the chunks, for a block of the state: entering gets S before each chunk.

    initial, final : (B, H, K, P, N) float32 or None. STEPS chunks at a time, as a product with the (STEPS, STEPS)
    decays between them: one memory latency for all of them, and a sum in float32 whatever dtype the states are kept in.
    """
    DIRECTIONS: tl.constexpr = PAST + FUTURE
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    sequence = program // BLOCKS  # of (batch, head, direction)
    direction, row = sequence % DIRECTIONS, sequence // DIRECTIONS
    future = direction >= PAST
    descending = future != GRADIENT
    offsets = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < SIZE
    step = tl.arange(0, STEPS)
    last_frame = tl.where(future, 0, CHUNK - 1)
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if initial is not None:
        state = tl.load(initial + sequence * SIZE + offsets, mask=inside, other=0.0)
    first = tl.where(descending, num_chunks - 1, 0)
    at = ((row * num_chunks + first) * DIRECTIONS + direction) * SIZE + offsets
    tl.store(entering + at, state.to(entering.dtype.element_ty), mask=inside)
    for start in tl.range(0, num_chunks, STEPS, num_stages=STAGES):
        position = start + step
        chunk = tl.where(descending, num_chunks - 1 - position, position)
        exists = position < num_chunks
        cell = (row * num_chunks + chunk) * DIRECTIONS + direction
        total = decays + cell * (3 * CHUNK) + last_frame
        log = tl.load(total, mask=exists, other=0.0).to(tl.float64)
        log += tl.load(total + CHUNK, mask=exists, other=0.0).to(tl.float64)
        cum = tl.cumsum(log, axis=0)
        between = (cum[:, None] - cum[None, :]).to(tl.float32)
        between = tl.where(step[:, None] >= step[None, :], tl.minimum(between, 0.0), -float("inf"))
        tile = tl.load(
            added + cell[:, None] * SIZE + offsets[None, :], mask=exists[:, None] & inside[None, :], other=0.0
        )
        # What a bad frame has made of its chunk is kept from the chunks before it.
        tile, bad = without_bad(tile.to(tl.float32))
        sums = spoil_from(tl.dot(tl.exp2(between), tile, input_precision=PRECISION), bad, True, False, STEPS)
        sums += tl.exp2(cum.to(tl.float32))[:, None] * state[None, :]
        following = cell + tl.where(descending, -DIRECTIONS, DIRECTIONS)
        tl.store(
            entering + following[:, None] * SIZE + offsets[None, :],
            sums.to(entering.dtype.element_ty),
            mask=(position + 1 < num_chunks)[:, None] & inside[None, :],
        )
        state = tl.sum(tl.where((step == STEPS - 1)[:, None], sums, 0.0), axis=0)
    if final is not None:
        tl.store(final + sequence * SIZE + offsets, state, mask=inside)
