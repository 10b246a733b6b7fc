"""The ways that an SSD takes on a CPU; Triton's interpreter, which runs the kernels where there is no GPU."""

import numpy
import pytest
import torch

from cald_speech.ops.ssd import torch_chunked
from tests.helpers import NATIVE

if not torch.cuda.is_available():
    from triton import language as tl
    from triton.runtime import interpreter

TORCH_WAYS = ["torch by blocks", "torch whole batch"]


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of a way: the torch backend has two, by the size of a sequence, and both are asked everything."""
    backend, _, how = way.partition(" ")
    monkeypatch.setattr(torch_chunked, "SMALL_SEQUENCE", 2**40 if how == "whole batch" else 0)
    return backend


@pytest.fixture(params=["naive", *TORCH_WAYS, NATIVE])
def ssd_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return choose(request.param, monkeypatch)


@pytest.fixture(params=[*TORCH_WAYS, NATIVE])
def fast_ssd_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Those that are compared with the recurrence."""
    return choose(request.param, monkeypatch)


@pytest.fixture(params=TORCH_WAYS)
def torch_ssd_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return choose(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def loops_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 takes a loop's bound with ``int()`` of an array of one element, which numpy 2.4 refuses."""
    if torch.cuda.is_available():
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(numpy.asarray(self.handle.data).item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture
def bfloat16_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the interpreter, which keeps bfloat16 as its 16 bits, products of the numbers and rounding to nearest.

    By itself it multiplies the bit patterns and cuts bits off, so that it says nothing of bfloat16 on a GPU.
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
