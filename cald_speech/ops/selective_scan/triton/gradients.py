"""The gradients of one chunk, from the state before it and the gradient of the state after it.

The chunk is short enough for all its states to stay in registers: they are computed once more forwards, then used
backwards. With g_t the gradient of the state after frame t and a_t = exp(dt_t A),

    g_t = dy_t C_t + a_{t+1} g_{t+1}          dC_t = sum_d dy_t h_t       dB_t = sum_d g_t dt_t x_t
    d(dt_t x_t) = <g_t, B_t>                  d(dt_t A) = g_t a_t h_{t-1}, a product and no difference: those cancel.
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


@triton.jit(do_not_specialize=["num_frames", "num_chunks"])
def gradients_kernel(
    dy, dy_strides, x, x_strides, dt, dt_strides, A, A_strides, B, B_strides, C, C_strides, D, lengths,
    entering, leaving, dx, ddt, dA, dB, dC, dD, num_frames, num_chunks, num_groups, num_blocks,
    REVERSE: tl.constexpr, GROUP_SIZE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients for BLOCKS blocks of channels, one after another.

    dx, ddt : (B, T, D), contiguous.
    dA, dD : (B, chunks, D, N) and (B, chunks, D), parts to be summed.
    dB, dC : (num_blocks, B, T, G, N), parts to be summed: fewer for more BLOCKS.
    """
    batch, chunk, group, part = locate(num_chunks, num_groups, num_blocks)
    end = end_of(lengths, batch, num_frames)
    steps = chunk * CHUNK + tl.arange(0, CHUNK)
    frames = frame_at(steps, end, REVERSE)
    part_B = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    part_C = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    for i in range(BLOCKS):
        channels, inside = channels_of(group, part * BLOCKS + i, GROUP_SIZE, BLOCK_D)
        dB_tile, dC_tile = block_gradients(
            dy, dy_strides, x, x_strides, dt, dt_strides, A, A_strides, B, B_strides, C, C_strides, D,
            entering, leaving, dx, ddt, dA, dD, num_frames, num_chunks, num_groups * GROUP_SIZE,
            batch, chunk, group, channels, inside, end, frames, REVERSE, N, BLOCK_D, BLOCK_N, CHUNK,
        )  # fmt: skip
        part_B += dB_tile
        part_C += dC_tile
    batches = tl.num_programs(0).to(tl.int64) // (num_chunks * num_groups * num_blocks)
    rows = ((part * batches + batch) * num_frames + frames) * num_groups + group
    entries = tl.arange(0, BLOCK_N)
    at, mask = rows[:, None] * N + entries[None, :], (steps < num_frames)[:, None] & (entries < N)[None, :]
    tl.store(dB + at, part_B, mask=mask)
    tl.store(dC + at, part_C, mask=mask)


@triton.jit
def block_gradients(
    dy, dy_strides, x, x_strides, dt, dt_strides, A, A_strides, B, B_strides, C, C_strides, D,
    entering, leaving, dx, ddt, dA, dD, num_frames, num_chunks, width,
    batch, chunk, group, channels, inside, end, frames,
    REVERSE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store one block's gradients; returns its parts of those of B and C, (CHUNK, BLOCK_N)."""
    rates, log2_rates = load_rates(A, A_strides, channels, inside, N, BLOCK_N)
    cell = (batch * num_chunks + chunk) * width
    offsets, mask = state_offsets(cell, channels, inside, N, BLOCK_N)
    direct = tl.zeros((BLOCK_D,), tl.float32)
    if D is not None:
        direct = tl.load(D + channels, mask=inside, other=0.0).to(tl.float32)
    # 1. Forwards, keeping the state before each frame.
    states = (tl.load(entering + offsets, mask=mask, other=0.0),)
    for k in tl.static_range(CHUNK):
        frame, valid = frame_at(chunk * CHUNK + k, end, REVERSE), chunk * CHUNK + k < end
        step_dt = load_channels(dt, dt_strides, batch, frame, channels, inside & valid)
        value = load_channels(x, x_strides, batch, frame, channels, inside & valid)
        b = load_map(B, B_strides, batch, frame, group, valid, N, BLOCK_N)
        added = (step_dt * value)[:, None] * b[None, :]
        states += (tl.exp2(step_dt[:, None] * log2_rates) * states[k] + added,)
    # 2. Backwards. What goes to memory waits in tiles, since no load moves ahead of a store.
    gradient = tl.load(leaving + offsets, mask=mask, other=0.0)
    dx_tile = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    ddt_tile = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    dB_tile = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dC_tile = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dA_sum = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    dD_sum = tl.zeros((BLOCK_D,), tl.float32)
    for i in tl.static_range(CHUNK):
        frame, valid = frame_at(chunk * CHUNK + CHUNK - 1 - i, end, REVERSE), chunk * CHUNK + CHUNK - 1 - i < end
        step_dt = load_channels(dt, dt_strides, batch, frame, channels, inside & valid)
        value = load_channels(x, x_strides, batch, frame, channels, inside & valid)
        output = load_channels(dy, dy_strides, batch, frame, channels, inside & valid)
        b = load_map(B, B_strides, batch, frame, group, valid, N, BLOCK_N)
        c = load_map(C, C_strides, batch, frame, group, valid, N, BLOCK_N)
        gradient += output[:, None] * c[None, :]
        dC_tile = with_row(dC_tile, CHUNK - 1 - i, tl.sum(output[:, None] * states[CHUNK - i], axis=0), CHUNK)
        dB_tile = with_row(dB_tile, CHUNK - 1 - i, tl.sum((step_dt * value)[:, None] * gradient, axis=0), CHUNK)
        weighted = tl.sum(gradient * b[None, :], axis=1)
        gradient *= tl.exp2(step_dt[:, None] * log2_rates)
        through = gradient * states[CHUNK - 1 - i]
        dA_sum += through * step_dt[:, None]
        dD_sum += output * value
        dx_tile = with_row(dx_tile, CHUNK - 1 - i, weighted * step_dt + direct * output, CHUNK)
        # A padded frame passes the state on: its dt would matter, if it were not padding.
        by_decay = tl.where(valid, tl.sum(through * rates, axis=1), 0.0)
        ddt_tile = with_row(ddt_tile, CHUNK - 1 - i, weighted * value + by_decay, CHUNK)
    at = (batch * num_frames + frames[:, None]) * width + channels[None, :]
    in_x = (chunk * CHUNK + tl.arange(0, CHUNK) < num_frames)[:, None] & inside[None, :]
    tl.store(dx + at, dx_tile.to(dx.dtype.element_ty), mask=in_x)
    tl.store(ddt + at, ddt_tile.to(ddt.dtype.element_ty), mask=in_x)
    tl.store(dA + offsets, dA_sum, mask=mask)
    tl.store(dD + cell + channels, dD_sum, mask=inside)
    return dB_tile, dC_tile
