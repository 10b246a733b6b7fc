"""What the SSD kernels share beyond ``ops/triton/tiles.py``: scans and their frames, and the decay between two frames.

``PAST`` and ``FUTURE`` (0 or 1) say which directions a scan has; they are numbered from 0, the past first, so that a
direction scans from the last frame to the first where ``direction >= PAST``.

A kernel runs its body for one scan or, along the second axis of its grid, for the past's and the future's.
"""

import triton
import triton.language as tl


@triton.jit
def run(body: tl.constexpr, tensors, strides, PAIR: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, others):
    """``body(program, PAST, FUTURE, *tensors, *strides, *others)`` for the scan that this program belongs to.

    tensors, strides : a tuple for each scan: for a single one, or for the past's and the future's (``PAIR``). Each of
    these keeps its own code, behind a branch that a whole program takes: the order of the decays is known to it. The
    second test is no ``else``, out of whose branches the compiler hoists what they have in common, into registers.
    """
    program = tl.program_id(0).to(tl.int64)
    if not PAIR:
        body(program, PAST, FUTURE, *tensors[0], *strides[0], *others)
    elif tl.program_id(1) == 0:
        body(program, 1, 0, *tensors[0], *strides[0], *others)
    elif tl.program_id(1) == 1:
        body(program, 0, 1, *tensors[1], *strides[1], *others)


@triton.jit
def frames_of(chunk, batch, lengths, num_frames, CHUNK: tl.constexpr):
    """The chunk's frames, and which of them are valid. Lengths are clamped: on a GPU nobody has checked them."""
    frames = chunk * CHUNK + tl.arange(0, CHUNK)
    end = num_frames
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + batch).to(tl.int64), num_frames)
    return frames, frames < end


@triton.jit
def state_tile(P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, first=0):
    """Offsets into one contiguous (P, N) state, from column ``first`` on, and which of them lie inside it."""
    rows, columns = tl.arange(0, BLOCK_P), first + tl.arange(0, BLOCK_N)
    return rows[:, None] * N + columns[None, :], (rows < P)[:, None] & (columns < N)[None, :]


@triton.jit
def load_decays(decays, cell, direction, DIRECTIONS: tl.constexpr, CHUNK: tl.constexpr):
    """Coarse part and rest of the running sum of log2 decays, and dt, for the frames of one chunk."""
    at = decays + (cell * DIRECTIONS + direction) * (3 * CHUNK) + tl.arange(0, CHUNK)
    return tl.load(at), tl.load(at + CHUNK), tl.load(at + 2 * CHUNK)


@triton.jit
def load_total(decays, cell, direction, FUTURE: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNK: tl.constexpr):
    """Coarse part and rest of the chunk's whole log2 decay: the running sum at the frame that is scanned last."""
    at = decays + (cell * DIRECTIONS + direction) * (3 * CHUNK)
    if not FUTURE:
        at += CHUNK - 1
    return tl.load(at), tl.load(at + CHUNK)


@triton.jit
def decay_between(coarse, rest, coarse_before, rest_before):
    """exp2 of a difference of running sums; rounding must not turn a decay into growth."""
    return tl.exp2(tl.minimum((coarse - coarse_before) + (rest - rest_before), 0.0))


@triton.jit
def decay_to_exit(
    decays, cell, direction, coarse, rest, FUTURE: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNK: tl.constexpr
):
    """Decay from each frame to the chunk's end, in the order of the scan."""
    total_coarse, total_rest = load_total(decays, cell, direction, FUTURE, DIRECTIONS, CHUNK)
    return decay_between(total_coarse, total_rest, coarse, rest)


@triton.jit
def target_minus_source(v, SOURCES_FIRST: tl.constexpr):
    """(CHUNK, CHUNK) differences of a value per frame, with the sources along the first axis or the second."""
    return v[None, :] - v[:, None] if SOURCES_FIRST else v[:, None] - v[None, :]


@triton.jit
def spread_sources(v, SOURCES_FIRST: tl.constexpr):
    return v[:, None] if SOURCES_FIRST else v[None, :]


@triton.jit
def pair_decays(
    decays, cell, PAST: tl.constexpr, FUTURE: tl.constexpr, CHUNK: tl.constexpr, SOURCES_FIRST: tl.constexpr
):
    """(CHUNK, CHUNK) decays from source to target frames, and the source's dt in the direction that links them.

    Sources before their target belong to the past, sources after it to the future; a frame reaches itself in every
    direction, with the sum of their dt. Pairs that no direction links get a decay of 0, by a mask before the exp.
    """
    DIRECTIONS: tl.constexpr = PAST + FUTURE
    index = tl.arange(0, CHUNK)
    ahead = target_minus_source(index, SOURCES_FIRST)
    log = tl.where(ahead == 0, 0.0, -float("inf"))
    dt = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    if PAST:
        coarse, rest, step = load_decays(decays, cell, 0, DIRECTIONS, CHUNK)
        between = target_minus_source(coarse, SOURCES_FIRST) + target_minus_source(rest, SOURCES_FIRST)
        log = tl.where(ahead > 0, between, log)
        dt = tl.where(ahead >= 0, spread_sources(step, SOURCES_FIRST), dt)
    if FUTURE:
        coarse, rest, step = load_decays(decays, cell, DIRECTIONS - 1, DIRECTIONS, CHUNK)
        between = target_minus_source(coarse, SOURCES_FIRST) + target_minus_source(rest, SOURCES_FIRST)
        log = tl.where(ahead < 0, between, log)
        dt += tl.where(ahead <= 0, spread_sources(step, SOURCES_FIRST), 0.0)
    return tl.exp2(tl.minimum(log, 0.0)), dt


@triton.jit
def where_linked(v, PAST: tl.constexpr, FUTURE: tl.constexpr, CHUNK: tl.constexpr, SOURCES_FIRST: tl.constexpr):
    """(CHUNK, CHUNK) pairs with zeros where no direction links them: a decay of 0 times NaN would be NaN."""
    ahead = target_minus_source(tl.arange(0, CHUNK), SOURCES_FIRST)
    if not FUTURE:
        v = tl.where(ahead >= 0, v, 0.0)
    if not PAST:
        v = tl.where(ahead <= 0, v, 0.0)
    return v
