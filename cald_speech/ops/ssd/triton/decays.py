"""Running sums of log decays within each chunk, once for all other kernels."""

import triton
import triton.language as tl

from cald_speech.ops.ssd.triton.tiles import frames_of, run
from cald_speech.ops.triton.tiles import locate


@triton.jit(do_not_specialize=["strides", "num_frames", "num_chunks"])
def decays_kernel(
    tensors, strides, lengths, num_frames: tl.int64, num_chunks: tl.int64,
    PAIR: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    run(chunk_decays, tensors, strides, PAIR, PAST, FUTURE, (lengths, num_frames, num_chunks, HEADS, CHUNK, BLOCK_H))


@triton.jit
def chunk_decays(
    program, PAST: tl.constexpr, FUTURE: tl.constexpr, dt, A, decays, dt_strides, lengths, num_frames, num_chunks,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dt (B, T, K, H) and A (K, H) to decays (B, H, chunks, K, 3, CHUNK): two parts of a running sum, and dt.

    The sum is that of ``dt A log2(e)`` from the chunk's entry to each frame, in the order of the scan, in float64:
    float32 sums lose 2e-4 of a decay once they reach 3,000. It is stored as a float32 and what that leaves over, whose
    differences are as good as float64's. Padded frames get dt = 0 and no decay: they leave the state as it is.
    """
    DIRECTIONS: tl.constexpr = PAST + FUTURE
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    batch, chunk, head_block = locate(program, num_chunks, HEAD_BLOCKS)
    frames, valid = frames_of(chunk, batch, lengths, num_frames, CHUNK)
    heads = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = heads < HEADS
    cells = (batch * HEADS + heads) * num_chunks + chunk
    for direction in tl.static_range(DIRECTIONS):
        rows = dt + batch * dt_strides[0] + frames * dt_strides[1] + direction * dt_strides[2]
        at = rows[:, None] + (heads * dt_strides[3])[None, :]
        step = tl.load(at, mask=valid[:, None] & exists[None, :], other=0.0).to(tl.float64)
        rate = tl.load(A + direction * HEADS + heads, mask=exists, other=0.0).to(tl.float64) * 1.4426950408889634
        cum = tl.cumsum(step * rate[None, :], axis=0, reverse=direction >= PAST)
        coarse = cum.to(tl.float32)
        out = decays + ((cells * DIRECTIONS + direction) * (3 * CHUNK))[None, :] + tl.arange(0, CHUNK)[:, None]
        tl.store(out, coarse, mask=exists[None, :])
        tl.store(out + CHUNK, (cum - coarse.to(tl.float64)).to(tl.float32), mask=exists[None, :])
        tl.store(out + 2 * CHUNK, step.to(tl.float32), mask=exists[None, :])
