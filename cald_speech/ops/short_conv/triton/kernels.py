"""Convolution, bias and SiLU in one kernel, and their gradients in another: every tensor is read and written once.

Each program takes some channels and some frames of one sequence, in the order of time. In the order of the scan, tap k
of frame t reads the input at t - (K-1) + k; with ``REVERSE`` at t + (K-1) - k. What lies outside the valid frames on
the side from which the scan comes is history: the K-1 frames of the initial state.

Offsets are int64 throughout: batch x frames x channels passes 2^31 elements within an hour of audio at batch 16.
"""

import triton
import triton.language as tl


@triton.jit
def locate(num_blocks, channel_blocks, BLOCK_D: tl.constexpr, channels):
    """Sequence, block of frames and channels of this program; channels run fastest."""
    program = tl.program_id(0).to(tl.int64)
    columns = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    rest = program // channel_blocks
    return rest // num_blocks, rest % num_blocks, columns, columns < channels


@triton.jit
def end_of(lengths, batch, num_frames):
    """Valid frames of a sequence. Lengths are clamped: on a GPU nobody has checked them."""
    end = batch * 0 + num_frames
    if lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int64), 0), end)
    return end


@triton.jit
def history_slot(frames, end, PAST: tl.constexpr, REVERSE: tl.constexpr):
    """Which entry of the initial state stands at a frame before 0 or, in reverse, from the end on."""
    if REVERSE:
        return PAST - 1 - (frames - end)
    else:
        return frames + PAST


@triton.jit
def load_seen(
    x, strides, state, state_strides, batch, frames, end, columns, inside, PAST: tl.constexpr, REVERSE: tl.constexpr
):
    """What the scan sees at some frames (frames, channels): the input, the history outside, and zeros beyond that."""
    valid = (frames >= 0) & (frames < end)
    at = x + batch * strides[0] + frames[:, None] * strides[1] + columns[None, :] * strides[2]
    seen = tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if state is not None:
        slots = history_slot(frames, end, PAST, REVERSE)
        before = (slots >= 0) & (slots < PAST) & ~valid
        at = state + batch * state_strides[0] + columns[None, :] * state_strides[1] + slots[:, None] * state_strides[2]
        seen += tl.load(at, mask=before[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return seen


@triton.jit
def tap_frame(frames, k, PAST: tl.constexpr, REVERSE: tl.constexpr):
    """Where tap k of some frames reads."""
    if REVERSE:
        return frames + PAST - k
    else:
        return frames - PAST + k


@triton.jit
def load_tap(weight, strides, k, columns, inside):
    return tl.load(weight + columns * strides[0] + k * strides[1], mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def weighted_sum(
    x, x_strides, weight, weight_strides, bias, state, state_strides, batch, frames, end, columns, inside,
    PAST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The convolution before the activation, (frames, channels) in float32."""
    total = tl.zeros((frames.shape[0], columns.shape[0]), tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(PAST + 1):
        seen = load_seen(
            x, x_strides, state, state_strides, batch, tap_frame(frames, k, PAST, REVERSE), end, columns, inside,
            PAST, REVERSE,
        )  # fmt: skip
        total += load_tap(weight, weight_strides, k, columns, inside) * seen
    return total


@triton.jit(do_not_specialize=["num_frames", "num_blocks"])
def forward_kernel(
    x, x_strides, weight, weight_strides, bias, state, state_strides, lengths, y, final_state,
    num_frames, channels, num_blocks, channel_blocks,
    PAST: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y, contiguous, zero at padding; the first block of each sequence also writes the final state."""
    batch, block, columns, inside = locate(num_blocks, channel_blocks, BLOCK_D, channels)
    end = end_of(lengths, batch, num_frames)
    frames = block * BLOCK_T + tl.arange(0, BLOCK_T)
    out = weighted_sum(
        x, x_strides, weight, weight_strides, bias, state, state_strides, batch, frames, end, columns, inside,
        PAST, REVERSE,
    )  # fmt: skip
    if SILU:
        out *= tl.sigmoid(out)
    out = tl.where((frames < end)[:, None], out, 0.0)
    at = y + ((batch * num_frames + frames[:, None]) * channels + columns[None, :])
    tl.store(at, out.to(y.dtype.element_ty), mask=(frames < num_frames)[:, None] & inside[None, :])
    if PAST > 0 and block == 0:
        store_final_state(
            x, x_strides, state, state_strides, final_state, batch, end, columns, inside, channels, PAST, REVERSE
        )


@triton.jit
def store_final_state(
    x, strides, state, state_strides, final_state, batch, end, columns, inside, channels,
    PAST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The K-1 inputs that the scan saw last, in its order, into a contiguous (B, D, K-1)."""
    for slot in tl.static_range(PAST):
        frame = (PAST - 1 - slot if REVERSE else end - PAST + slot) + tl.zeros((1,), tl.int64)
        seen = load_seen(x, strides, state, state_strides, batch, frame, end, columns, inside, PAST, REVERSE)
        at = final_state + (batch * channels + columns[None, :]) * PAST + slot
        tl.store(at, seen.to(final_state.dtype.element_ty), mask=inside[None, :])


@triton.jit
def sum_gradient(
    dy, dy_strides, x, x_strides, weight, weight_strides, bias, state, state_strides, batch, frames, end,
    columns, inside, PAST: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum before the activation, zero at frames that are not valid."""
    valid = (frames >= 0) & (frames < end)
    at = dy + batch * dy_strides[0] + frames[:, None] * dy_strides[1] + columns[None, :] * dy_strides[2]
    gradient = tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if SILU:
        total = weighted_sum(
            x, x_strides, weight, weight_strides, bias, state, state_strides, batch, frames, end, columns, inside,
            PAST, REVERSE,
        )  # fmt: skip
        open_ = tl.sigmoid(total)
        gradient *= open_ * (1.0 + total * (1.0 - open_))
    return gradient


@triton.jit(do_not_specialize=["num_frames", "num_blocks"])
def backward_kernel(
    dy, dy_strides, x, x_strides, weight, weight_strides, bias, state, state_strides, lengths, dfinal, dfinal_strides,
    dx, dstate, dweight, dbias, num_frames, channels, num_blocks, channel_blocks,
    PAST: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx and dstate (B, D, K-1), contiguous; dweight (programs, K, D) and dbias (programs, D) as parts to be summed.

    The frames include the history: T + K-1 places, of which some belong to dx, some to dstate. Each tile computes the
    gradients of the K sums in which its frames took part from the inputs again, whose loads the first cache serves.
    """
    batch, block, columns, inside = locate(num_blocks, channel_blocks, BLOCK_D, channels)
    end = end_of(lengths, batch, num_frames)
    # One row for each tap's sum, then one for the bias; ROWS is a power of two that holds them.
    rows = tl.arange(0, ROWS)
    parts = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for tile in range(TILES):
        frames = (block * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        if not REVERSE:
            frames -= PAST
        # 1. The taps' and the bias's parts, from the sums at these frames.
        own = sum_gradient(
            dy, dy_strides, x, x_strides, weight, weight_strides, bias, state, state_strides, batch, frames, end,
            columns, inside, PAST, REVERSE, SILU,
        )  # fmt: skip
        for k in tl.static_range(PAST + 1):
            seen = load_seen(
                x, x_strides, state, state_strides, batch, tap_frame(frames, k, PAST, REVERSE), end, columns, inside,
                PAST, REVERSE,
            )  # fmt: skip
            parts += tl.where((rows == k)[:, None], tl.sum(own * seen, axis=0)[None, :], 0.0)
        parts += tl.where((rows == PAST + 1)[:, None], tl.sum(own, axis=0)[None, :], 0.0)
        # 2. The inputs' gradients, from the sums in which they took part.
        gradient = own * load_tap(weight, weight_strides, PAST, columns, inside)
        for k in range(PAST):
            later = tap_frame(frames, 2 * PAST - k, PAST, REVERSE)
            taken = sum_gradient(
                dy, dy_strides, x, x_strides, weight, weight_strides, bias, state, state_strides, batch, later, end,
                columns, inside, PAST, REVERSE, SILU,
            )  # fmt: skip
            gradient += taken * load_tap(weight, weight_strides, k, columns, inside)
        valid = (frames >= 0) & (frames < end)
        if PAST > 0:
            # The final state is a copy of what the scan saw last.
            slots = PAST - 1 - frames if REVERSE else frames - (end - PAST)
            at = dfinal + batch * dfinal_strides[0] + columns[None, :] * dfinal_strides[1]
            kept = ((slots >= 0) & (slots < PAST))[:, None] & inside[None, :]
            gradient += tl.load(at + slots[:, None] * dfinal_strides[2], mask=kept, other=0.0).to(tl.float32)
            slots = history_slot(frames, end, PAST, REVERSE)
            before = (slots >= 0) & (slots < PAST) & ~valid
            at = dstate + (batch * channels + columns[None, :]) * PAST + slots[:, None]
            tl.store(at, gradient, mask=before[:, None] & inside[None, :])
        in_x = (frames >= 0) & (frames < num_frames)
        at = dx + ((batch * num_frames + frames[:, None]) * channels + columns[None, :])
        gradient = tl.where(valid[:, None], gradient, 0.0)
        tl.store(at, gradient.to(dx.dtype.element_ty), mask=in_x[:, None] & inside[None, :])
    part = batch * num_blocks + block
    at = dweight + (part * (PAST + 1) + rows[:, None]) * channels + columns[None, :]
    tl.store(at, parts, mask=(rows <= PAST)[:, None] & inside[None, :])
    at = dbias + part * channels + columns[None, :] + rows[:, None] * 0
    tl.store(at, parts, mask=(rows == PAST + 1)[:, None] & inside[None, :])
