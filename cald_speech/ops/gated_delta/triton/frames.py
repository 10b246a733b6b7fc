"""What the kernels of the gated delta rule share: frames in the order of the scan, halvings of a chunk, decays.

A chunk is halved, its halves are, and so on down to single frames. Each pair of frames then has one *level* at which
a middle parts it, the earlier frame in the first half and the later one in the second. Two things are worked out level
by level, in log2(CHUNK) matrix products each: the decays of channels, and a triangular inverse.
"""

import triton
import triton.language as tl

from cald_speech.ops.triton.tiles import without_bad

# Below this exp(g) is 0 in float32, however much is added to g: it stands for -inf, of which differences are NaN.
LEAST_LOG = tl.constexpr(-1e5)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def frames_in_order(chunk, batch, lengths, num_frames, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """The chunk's frames in the order of the scan, and which of them are valid.

    In reverse the scan begins at the last valid frame: a sequence is cut up as it is without padding, which comes last
    in either direction. Lengths are clamped: on a GPU nobody has checked them.
    """
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    end = num_frames
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + batch).to(tl.int64), num_frames)
    valid = position < end
    if REVERSE:
        return tl.where(valid, end - 1 - position, position), valid
    return position, valid


@triton.jit
def load_numbers(v, strides, batch, frames, head, valid):
    """(CHUNK,) numbers of one head of v (B, T, H); zeros at padding."""
    return tl.load(v + batch * strides[0] + frames * strides[1] + head * strides[2], mask=valid, other=0.0)


@triton.jit
def matrix_tile(
    number, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    first_row=0, first_column=0,
):  # fmt: skip
    """Offsets into a block of the matrix of this number, of many contiguous ones, and which of them lie inside it."""
    rows, columns = first_row + tl.arange(0, BLOCK_HEIGHT), first_column + tl.arange(0, BLOCK_WIDTH)
    offsets = number * (HEIGHT * WIDTH) + rows[:, None] * WIDTH + columns[None, :]
    return offsets, (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def load_matrix(
    v, number, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    first_row=0, first_column=0,
):  # fmt: skip
    offsets, inside = matrix_tile(number, HEIGHT, WIDTH, BLOCK_HEIGHT, BLOCK_WIDTH, first_row, first_column)
    return tl.load(v + offsets, mask=inside, other=0.0)


@triton.jit
def store_matrix(
    v, tile, number, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    first_row=0, first_column=0,
):  # fmt: skip
    offsets, inside = matrix_tile(number, HEIGHT, WIDTH, BLOCK_HEIGHT, BLOCK_WIDTH, first_row, first_column)
    tl.store(v + offsets, tile.to(v.dtype.element_ty), mask=inside)


@triton.jit
def parted_at(level, CHUNK: tl.constexpr):
    """(CHUNK, CHUNK) booleans: pairs [later, earlier] that this level's middles part, and [frame, other] whether the
    other's decay lies between the frame and its middle."""
    index = tl.arange(0, CHUNK)
    half = index >> level
    second = half % 2 == 1
    row, column = index[:, None], index[None, :]
    parted = second[:, None] & (half[:, None] == half[None, :] + 1)
    between = (half[:, None] == half[None, :]) & tl.where(second[:, None], column <= row, column > row)
    return parted, between


@triton.jit
def chosen_sums(chosen, v, SUMS: tl.constexpr):
    """For each row of ``chosen`` the sum of those rows of v: of one sign it loses nothing, as differences of sums."""
    return tl.dot(chosen.to(tl.float32), v, input_precision=SUMS)


@triton.jit
def finite_decays(g):
    """Log decays in float32 with a very small one for -inf and 0 for what is bad, and where that was: what grows past
    every number is bad as well."""
    g = g.to(tl.float32)
    g = tl.where(g > -LEAST_LOG, float("inf"), g)
    return without_bad(tl.where(g < LEAST_LOG, LEAST_LOG, g))


@triton.jit
def decays_of_a_head(g, CHUNK: tl.constexpr):
    """From (CHUNK,) log decays: the decay since the chunk's entry, up to its exit (CHUNK, 1), over all of it (1,), and
    between two frames [later, earlier] (CHUNK, CHUNK), 0 where they are not in this order.

    The running sum is kept as a float32 and what that leaves over: differences are then as good as float64's, and
    float32's alone would lose 2e-4 of a decay once the sum reaches 3,000.
    """
    cum = tl.cumsum(g.to(tl.float64) * LOG2_E, axis=0)
    total = tl.sum(g.to(tl.float64) * LOG2_E, axis=0)
    coarse = cum.to(tl.float32)
    rest = (cum - coarse.to(tl.float64)).to(tl.float32)
    between = (coarse[:, None] - coarse[None, :]) + (rest[:, None] - rest[None, :])
    index = tl.arange(0, CHUNK)
    between = tl.where(index[:, None] >= index[None, :], tl.minimum(between, 0.0), -float("inf"))
    # Rounding must not turn a decay into growth.
    to_exit = tl.exp2(tl.minimum((total - cum).to(tl.float32), 0.0))
    return tl.exp2(coarse + rest)[:, None], to_exit[:, None], tl.exp2(total.to(tl.float32)), tl.exp2(between)


@triton.jit
def decays_of_channels(g, CHUNK: tl.constexpr, SUMS: tl.constexpr):
    """From (CHUNK, BLOCK_N) log decays: the decay since the chunk's entry, up to its exit, and over all of it."""
    index = tl.arange(0, CHUNK)
    since_entry = tl.exp(chosen_sums(index[:, None] >= index[None, :], g, SUMS))
    to_exit = tl.exp(chosen_sums(index[:, None] < index[None, :], g, SUMS))
    return since_entry, to_exit, tl.exp(tl.sum(g, axis=0))
