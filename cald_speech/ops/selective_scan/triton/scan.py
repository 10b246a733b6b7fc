"""The scan in three launches: every chunk from an empty state, the states carried over chunks, every chunk's outputs.

Within a program frames go one by one, with the states of some channels in registers; chunks run in parallel, so that
a single long sequence fills a GPU as well as a batch does. A chunk multiplies the state that it is given by
exp(A sum dt), and adds what it makes of an empty one.
"""

import triton
import triton.language as tl

from cald_speech.ops.selective_scan.triton.frames import (
    channels_of,
    end_of,
    frame_at,
    load_channels,
    load_map,
    load_rates,
    locate,
    state_offsets,
    with_row,
)


@triton.jit(do_not_specialize=["num_frames", "num_chunks", "chunk_size"])
def chunks_kernel(
    x, x_strides, dt, dt_strides, A, A_strides, B, B_strides, lengths, added, total_dt,
    num_frames, num_chunks, chunk_size, num_groups, num_blocks,
    REVERSE: tl.constexpr, BACKWARD: tl.constexpr, GROUP_SIZE: tl.constexpr, N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state, (B, chunks, D, N), and the sum of its dt, (B, chunks, D).

    With BACKWARD, for x the outputs' gradient and for B the map C: what each chunk adds to the gradient of the state
    before it, over its steps in opposite order.
    """
    batch, chunk, group, block = locate(num_chunks, num_groups, num_blocks)
    channels, inside = channels_of(group, block, GROUP_SIZE, BLOCK_D)
    end = end_of(lengths, batch, num_frames)
    _, rates = load_rates(A, A_strides, channels, inside, N, BLOCK_N)
    state = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, chunk_size, UNROLL):
        for i in tl.static_range(UNROLL):
            step = chunk * chunk_size + (chunk_size - 1 - first - i if BACKWARD else first + i)
            frame, valid = frame_at(step, end, REVERSE), step < end
            step_dt = load_channels(dt, dt_strides, batch, frame, channels, inside & valid)
            value = load_channels(x, x_strides, batch, frame, channels, inside & valid)
            b = load_map(B, B_strides, batch, frame, group, valid, N, BLOCK_N)
            decay = tl.exp2(step_dt[:, None] * rates)
            if BACKWARD:
                state = decay * (state + value[:, None] * b[None, :])
            else:
                state = decay * state + (step_dt * value)[:, None] * b[None, :]
            total += step_dt
    cell = (batch * num_chunks + chunk) * (num_groups * GROUP_SIZE)
    offsets, mask = state_offsets(cell, channels, inside, N, BLOCK_N)
    tl.store(added + offsets, state, mask=mask)
    if not BACKWARD:
        tl.store(total_dt + cell + channels, total, mask=inside)


@triton.jit(do_not_specialize=["num_chunks"])
def carry_kernel(
    states, total_dt, A, A_strides, initial, initial_strides, final, num_chunks, num_groups, num_blocks,
    BACKWARD: tl.constexpr, GROUP_SIZE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Replace what each chunk adds by the state before it; BACKWARD, by the gradient of the state after it."""
    batch, _, group, block = locate(1, num_groups, num_blocks)
    channels, inside = channels_of(group, block, GROUP_SIZE, BLOCK_D)
    _, rates = load_rates(A, A_strides, channels, inside, N, BLOCK_N)
    width = num_groups * GROUP_SIZE
    offsets, mask = state_offsets(batch * width, channels, inside, N, BLOCK_N)
    state = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if initial is not None:
        entries = tl.arange(0, BLOCK_N)[None, :] * initial_strides[2]
        at = initial + batch * initial_strides[0] + channels[:, None] * initial_strides[1] + entries
        state = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    cell = (batch * num_chunks + (num_chunks - 1 if BACKWARD else 0)) * width
    towards = -width if BACKWARD else width
    chunk_offsets, _ = state_offsets(cell, channels, inside, N, BLOCK_N)
    # Loads run one chunk ahead of the arithmetic.
    added = tl.load(states + chunk_offsets, mask=mask & (num_chunks > 0), other=0.0)
    total = tl.load(total_dt + cell + channels, mask=inside & (num_chunks > 0), other=0.0)
    for chunk in range(num_chunks):
        cell += towards
        more = chunk + 1 < num_chunks
        next_added = tl.load(states + chunk_offsets + towards * N, mask=mask & more, other=0.0)
        next_total = tl.load(total_dt + cell + channels, mask=inside & more, other=0.0)
        # What one thread overwrites, another may still have to load.
        tl.debug_barrier()
        tl.store(states + chunk_offsets, state, mask=mask)
        state = tl.exp2(total[:, None] * rates) * state + added
        added, total = next_added, next_total
        chunk_offsets += towards * N
    tl.store(final + offsets, state, mask=mask)


@triton.jit(do_not_specialize=["num_frames", "num_chunks", "chunk_size"])
def outputs_kernel(
    x, x_strides, dt, dt_strides, A, A_strides, B, B_strides, C, C_strides, D, lengths, entering, y,
    num_frames, num_chunks, chunk_size, num_groups, num_blocks,
    REVERSE: tl.constexpr, GROUP_SIZE: tl.constexpr, N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y (B, T, D), contiguous, zero at padding, from the states before each chunk."""
    batch, chunk, group, block = locate(num_chunks, num_groups, num_blocks)
    channels, inside = channels_of(group, block, GROUP_SIZE, BLOCK_D)
    end = end_of(lengths, batch, num_frames)
    _, rates = load_rates(A, A_strides, channels, inside, N, BLOCK_N)
    width = num_groups * GROUP_SIZE
    offsets, mask = state_offsets((batch * num_chunks + chunk) * width, channels, inside, N, BLOCK_N)
    state = tl.load(entering + offsets, mask=mask, other=0.0)
    direct = tl.zeros((BLOCK_D,), tl.float32)
    if D is not None:
        direct = tl.load(D + channels, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, chunk_size, UNROLL):
        # Outputs wait in a tile, since no load moves ahead of a store.
        outputs = tl.zeros((UNROLL, BLOCK_D), tl.float32)
        for i in tl.static_range(UNROLL):
            step = chunk * chunk_size + first + i
            frame, valid = frame_at(step, end, REVERSE), step < end
            step_dt = load_channels(dt, dt_strides, batch, frame, channels, inside & valid)
            value = load_channels(x, x_strides, batch, frame, channels, inside & valid)
            b = load_map(B, B_strides, batch, frame, group, valid, N, BLOCK_N)
            c = load_map(C, C_strides, batch, frame, group, valid, N, BLOCK_N)
            state = tl.exp2(step_dt[:, None] * rates) * state + (step_dt * value)[:, None] * b[None, :]
            outputs = with_row(outputs, i, tl.sum(state * c[None, :], axis=1) + direct * value, UNROLL)
        steps = chunk * chunk_size + first + tl.arange(0, UNROLL)
        rows = batch * num_frames + frame_at(steps, end, REVERSE)
        outputs = tl.where((steps < end)[:, None], outputs, 0.0)  # a bad frame's state, times a C of zeros, is NaN
        in_y = (steps < num_frames)[:, None] & inside[None, :]
        tl.store(y + (rows[:, None] * width + channels[None, :]), outputs.to(y.dtype.element_ty), mask=in_y)
