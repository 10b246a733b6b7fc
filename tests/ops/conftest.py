"""The ways through the ops, each with the sizes at which it is asked; Triton's interpreter in bfloat16."""

from dataclasses import replace

import numpy
import pytest
import torch

from cald_speech.ops import OPS
from cald_speech.ops.gated_delta.triton import launch as delta_launch
from cald_speech.ops.selective_scan.triton import launch
from cald_speech.ops.short_conv import native as native_conv
from cald_speech.ops.short_conv import torch_blocked as torch_conv
from cald_speech.ops.short_conv import triton as triton_conv
from cald_speech.ops.ssd import torch_chunked
from tests.ops.cases import Way

if not torch.cuda.is_available():
    from triton import language as tl
    from triton.runtime import interpreter


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """What the test is parametrised with, its blocks made small enough for a few frames to have several."""
    set_small_blocks(request.param, monkeypatch)
    return request.param


def set_small_blocks(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    if way.op.startswith("ssd") and way.backend == "torch":
        # Two ways, by the size of a sequence.
        monkeypatch.setattr(torch_chunked, "SMALL_SEQUENCE", 2**40 if way.how == "whole batch" else 0)
    if way.op == "short_conv":
        monkeypatch.setattr(torch_conv, "BLOCK_ELEMENTS", 1)  # blocks of sixteen frames
        for name, value in {"FRAMES_PER_TASK": 16, "STRIP_CHANNELS": 16, "ELEMENTS_PER_THREAD": 1}.items():
            monkeypatch.setattr(native_conv, name, value)
        set_tiles(monkeypatch, frames=16, channels=8, tiles=1)
    if way.op == "selective_scan" and way.backend == "triton":
        short_chunks(monkeypatch)
        for name in ("FORWARD_CHANNELS", "BACKWARD_CHANNELS"):
            monkeypatch.setattr(launch, name, 8)
    if way.op == "gated_delta" and way.backend == "triton":
        small_tiles(monkeypatch)


def set_tiles(monkeypatch: pytest.MonkeyPatch, frames: int, channels: int, tiles: int) -> None:
    """Of the convolution in Triton; the interpreter's time goes with their number, whatever their size."""
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(triton_conv, name, {"BLOCK_T": frames, "BLOCK_D": channels, "num_warps": 1})
    monkeypatch.setattr(triton_conv, "BACKWARD_TILES", tiles)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the gated delta rule in Triton, the smallest that a matrix product takes."""
    monkeypatch.setattr(delta_launch, "tiling", lambda *sizes: delta_launch.Tiling(16, 16, 16, 1))


def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the selective scan in Triton; the interpreter's time goes with the frames, padded to whole chunks."""
    for name in ("UNROLL", "BACKWARD_CHUNK", "CHUNK_SIZE"):
        monkeypatch.setattr(launch, name, 4)


@pytest.fixture
def bfloat16_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the interpreter, which keeps bfloat16 as its 16 bits, products of the numbers and rounding to nearest.

    By itself it multiplies the bit patterns and cuts bits off, so that it says nothing of bfloat16 on a GPU, and the op
    refuses it.
    """
    if torch.cuda.is_available():
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def values(operand):
        bits = operand.data
        return (bits.astype(numpy.uint32) << 16).view(numpy.float32) if bits.dtype == numpy.uint16 else bits

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return handle(numpy.matmul(values(a), values(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def round_to_nearest(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        rounded = torch.from_numpy(numpy.array(source.data)).bfloat16().view(torch.int16)
        return handle(rounded.numpy().view(numpy.uint16), tl.bfloat16)

    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "cast_impl", round_to_nearest)
    for backends in filter(lambda backends: "triton" in backends, OPS.values()):
        monkeypatch.setitem(backends, "triton", replace(backends["triton"], why_not=lambda request: None))
