"""What the kernels of the scans in chunks share: where a program works, tiles over frames, products, bad values.

Every program works on one chunk of frames of one sequence. Offsets are int64 throughout: batch x frames x width passes
2^31 elements within an hour of audio at batch 16.
"""

import triton
import triton.language as tl


def padded(size: int) -> int:
    """The block that holds a head or state of this size: a power of two, and at least what a matrix product needs."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def locate(program, num_chunks, UNITS: tl.constexpr):
    """Sequence, chunk and head (or group) of a program; heads run fastest, since neighbours share B and C."""
    rest = program // UNITS
    return rest // num_chunks, rest % num_chunks, program % UNITS


@triton.jit
def load_frames(v, strides, batch, frames, unit, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """(CHUNK, BLOCK) tile of one head or group of v (B, T, units, WIDTH); zeros beyond the width and at padding."""
    rows = v + batch * strides[0] + frames * strides[1] + unit * strides[2]
    columns = first + tl.arange(0, BLOCK)
    return tl.load(rows[:, None] + columns[None, :], mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_frames(
    v, tile, batch, frames, num_frames, unit, UNITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, first=0
):
    """Write a tile of one head or group of a contiguous v (B, T, units, WIDTH), padding included."""
    rows = v + ((batch * num_frames + frames) * UNITS + unit) * WIDTH
    columns = first + tl.arange(0, BLOCK)
    mask = (frames < num_frames)[:, None] & (columns < WIDTH)[None, :]
    tl.store(rows[:, None] + columns[None, :], tile.to(v.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, WORK: tl.constexpr, PRECISION: tl.constexpr):
    """A matrix product with an operand that was computed in float32: rounded to WORK, summed in float32."""
    return tl.dot(a.to(WORK), b.to(WORK), input_precision=PRECISION)


@triton.jit
def without_bad(tile):
    """The tile with 0 for NaN and infinity, and where these were: zero times them is NaN, in a product."""
    bad = ~(tl.abs(tile.to(tl.float32)) < float("inf"))
    return tl.where(bad, 0.0, tile).to(tile.dtype), bad


@triton.jit
def spoil_from(tile, bad, PAST: tl.constexpr, FUTURE: tl.constexpr, ROWS: tl.constexpr):
    """NaN in every column of ``tile`` from a bad row on, down for the past's scan, up for the future's."""
    row = tl.arange(0, ROWS)[:, None]
    if PAST:
        first = tl.min(tl.where(bad, row, ROWS), axis=0)[None, :]
        tile = tl.where(row >= first, float("nan"), tile)
    if FUTURE:
        last = tl.max(tl.where(bad, row, -1), axis=0)[None, :]
        tile = tl.where(row <= last, float("nan"), tile)
    return tile
