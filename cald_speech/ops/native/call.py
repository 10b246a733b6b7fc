"""Handing tensors to the C kernels: a structure of sizes and addresses, and scratch for each thread."""

import ctypes
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from cald_speech.ops.backends import device_of
from cald_speech.ops.native import library

PAD = 16  # of vectors.h: scratch has whole vectors on every processor
CACHE_LINE = 64


class Field(ctypes.Structure):
    """``Field`` of kernel.h: one field as C lays it out."""

    _fields_ = [("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64)]


class Strided(ctypes.Structure):
    """``Tensor`` of tensor.h: (batch, frame, head, features), the last axis contiguous."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "frame", "head"))]


@cache
def check_fields(structure: type[ctypes.Structure], exported_as: str) -> None:
    """Raise RuntimeError unless C has the structure's fields, in name, offset and size; names the first that differs.

    C's description of it is what ``<exported_as>_fields()`` returns, made by ``EXPORT_FIELDS`` of fields.h.
    """
    describe = getattr(library(), f"{exported_as}_fields")
    describe.restype = ctypes.POINTER(Field)
    layouts = [(name, getattr(structure, name)) for name, _ in structure._fields_]
    ours = [(name, layout.offset, layout.size) for name, layout in layouts]
    ours.append(("no more", 0, ctypes.sizeof(structure)))
    for here, field in zip(ours, describe(), strict=False):  # in this order: C's list has an end, its pointer has none
        there = (field.name.decode() if field.name else "no more", field.offset, field.size)
        if here != there:
            ours, theirs = ("{0} ({2} bytes at {1})".format(*one) for one in (here, there))
            raise RuntimeError(f"{exported_as}: C has {theirs} where {structure.__name__} has {ours}")


class Call:
    """One call's arguments, and the tensors whose memory they point to, which have to live as long."""

    def __init__(self, op: str, arguments: ctypes.Structure):
        self.op, self.arguments = op, arguments
        self.held: list[Tensor] = []

    def strided(self, **tensors: Tensor) -> None:
        """Set float32 tensors of four axes; only the last has to be contiguous, and is made so where it is not."""
        for name, v in tensors.items():
            v = v.float().resolve_neg()
            v = v if v.stride(3) == 1 or v.size(3) == 1 else v.contiguous()
            setattr(self.arguments, name, Strided(self.address(name, v), *v.stride()[:3]))

    def written(self, **tensors: Tensor) -> None:
        """The same for tensors that the kernels write to: a copy of one would take the result with it."""
        for name, v in tensors.items():
            if v.dtype != torch.float32 or v.device.type != "cpu" or (v.stride(3) != 1 and v.size(3) > 1):
                raise ValueError(
                    f"{name}: expected float32 on the CPU with a contiguous last axis, got {v.dtype} on {v.device}"
                )
        self.strided(**tensors)

    def contiguous(self, **tensors: Tensor | None) -> None:
        """Set tensors of the right dtype; None becomes NULL."""
        for name, v in tensors.items():
            if v is not None:
                setattr(self.arguments, name, self.address(name, v.contiguous()))

    def address(self, name: str, v: Tensor) -> int:
        """Of a tensor that is held from now on. Raises ValueError where C would find nothing there, and crash."""
        if device_of(v).type != "cpu":
            raise ValueError(f"{name}: expected values on the CPU, got {type(v).__name__} on {device_of(v)}")
        self.held.append(v)
        return v.data_ptr()

    def run(self, name: str) -> None:
        """Call ``cald_<op>_<name>(arguments, scratch)``; the same name with ``_scratch`` says what a thread needs."""
        check_fields(Strided, "cald_tensor")
        check_fields(type(self.arguments), f"cald_{self.op}")
        kernels, arguments = library(), ctypes.byref(self.arguments)
        needed = getattr(kernels, f"cald_{self.op}_{name}_scratch")
        needed.restype = ctypes.c_int64
        size = self.arguments.threads * needed(arguments) + CACHE_LINE
        scratch = torch.zeros(size, dtype=torch.uint8, device="cpu")  # whatever the process's default device is
        start = scratch.data_ptr() + -scratch.data_ptr() % CACHE_LINE
        getattr(kernels, f"cald_{self.op}_{name}")(arguments, ctypes.c_void_p(start))


def with_half_precision(stream: int = 0, *, casts_state: bool = False) -> Callable[[Callable], Callable]:
    """A decorator of an op's function in float32: bfloat16 and float16 come in, and y goes out, rounded once.

    Arguments
    ---------
    stream : the place of the argument whose dtype is y's; the function itself takes the others in any.
    casts_state : True gives the final state the same dtype, where it holds nothing but inputs.
    """

    def decorate(run: Callable) -> Callable:
        @wraps(run)
        def wrapped(*tensors: Any, **options: Any) -> Any:
            dtype = tensors[stream].dtype
            if dtype == torch.float32:
                return run(*tensors, **options)
            found = run(*tensors[:stream], tensors[stream].float(), *tensors[stream + 1 :], **options)
            if isinstance(found, Tensor):
                return found.to(dtype)
            y, state = found
            return y.to(dtype), state.to(dtype) if casts_state else state

        return wrapped

    return decorate


def padded(size: int) -> int:
    """The size in scratch.

    Example
    -------
    >>> padded(17)
    32
    """
    return -(-size // PAD) * PAD


def parts_of(units: int, others: int) -> int:
    """Into how many parts ``units`` of work are split, ``others`` times as many there being: two tasks a thread."""
    threads = torch.get_num_threads()
    return max(1, min(units, -(-2 * threads // max(1, others)))) if threads > 1 else 1
