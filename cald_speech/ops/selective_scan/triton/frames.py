"""What the kernels of the selective scan share: where a program works, and how it reads one frame.

Steps count frames in the order of the scan, from 0; chunks are runs of steps. In reverse, step s is frame end - 1 - s
of a sequence with ``end`` valid frames. Steps from ``end`` on stand for the padding, in the order of time: they are
read as zeros, and a frame with dt = 0 and x = 0 leaves the state alone.

Offsets are int64 throughout: batch x frames x channels passes 2^31 elements within an hour of audio at batch 16.
"""

import triton
import triton.language as tl


@triton.jit
def locate(num_chunks, num_groups, num_blocks):
    """Sequence, chunk, group and block of the group's channels of this program; channels run fastest."""
    program = tl.program_id(0).to(tl.int64)
    rest = program // num_blocks
    return rest // num_groups // num_chunks, rest // num_groups % num_chunks, rest % num_groups, program % num_blocks


@triton.jit
def channels_of(group, block, GROUP_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels of one block, and which of them belong to the group."""
    inside = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return group * GROUP_SIZE + inside, inside < GROUP_SIZE


@triton.jit
def end_of(lengths, batch, num_frames):
    """Valid frames of a sequence. Lengths are clamped: on a GPU nobody has checked them."""
    end = batch * 0 + num_frames
    if lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int64), 0), end)
    return end


@triton.jit
def frame_at(steps, end, REVERSE: tl.constexpr):
    if REVERSE:
        return tl.where(steps < end, end - 1 - steps, steps)
    else:
        return steps


@triton.jit
def load_channels(v, strides, batch, frame, channels, mask):
    """(BLOCK_D,) of v (B, T, D) in float32, zeros where masked."""
    at = v + batch * strides[0] + frame * strides[1] + channels * strides[2]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_map(v, strides, batch, frame, group, valid, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_N,) of B or C (B, T, G, N) in float32, zeros beyond N and where not valid."""
    entries = tl.arange(0, BLOCK_N)
    at = v + batch * strides[0] + frame * strides[1] + group * strides[2] + entries * strides[3]
    return tl.load(at, mask=(entries < N) & valid, other=0.0).to(tl.float32)


@triton.jit
def load_rates(A, strides, channels, inside, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_D, BLOCK_N) of A (D, N), and the same for exp2."""
    entries = tl.arange(0, BLOCK_N)
    at = A + channels[:, None] * strides[0] + entries[None, :] * strides[1]
    rates = tl.load(at, mask=inside[:, None] & (entries < N)[None, :], other=0.0).to(tl.float32)
    return rates, rates * 1.4426950408889634


@triton.jit
def state_offsets(first, channels, inside, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of a tile of states in a contiguous (..., D, N) from row ``first`` on, and which of them lie inside."""
    entries = tl.arange(0, BLOCK_N)
    return (first + channels[:, None]) * N + entries[None, :], inside[:, None] & (entries < N)[None, :]


@triton.jit
def with_row(tile, row, values, ROWS: tl.constexpr):
    """``tile`` (ROWS, width) with ``values`` (width,) added to one row."""
    return tile + tl.where((tl.arange(0, ROWS) == row)[:, None], values[None, :], 0.0)
