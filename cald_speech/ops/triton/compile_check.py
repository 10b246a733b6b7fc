"""Compiles the scans in chunks for real GPUs on a machine that has none, and reads what the assembler says of them.

The launches are those of a real call, on a few frames; only the last step, handing the program to a driver, is left
out. `cald-speech benchmark kernels` prints registers, spilled bytes (the stack frame) and shared memory of each.
"""

import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from cald_speech.ops.gated_delta.triton import gated_delta_triton
from cald_speech.ops.ssd.triton import ssd_bidirectional_triton, ssd_pair_triton, ssd_triton

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Shared memory that one program may use: Hopper; A100; RTX 30 and 40.
SHARED_KIB = {90: 227, 80: 163, 86: 99, 89: 99}


class PretendDriver:
    """A driver of a GPU that is not there: enough for Triton to compile for it. Each capability is a device."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Usage:
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int


def usage_of(kernel) -> Usage:
    """What the assembled kernel uses, as cuobjdump reads it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL")}
    spilled = found["STACK"] + found["LOCAL"]
    return Usage(kernel.metadata.name, found["REG"], spilled, kernel.metadata.shared, kernel.metadata.num_warps)


def compiled_kernels(capability: int, run) -> list:
    """Every kernel that ``run`` would launch, compiled for a capability and not launched."""
    compiled = []

    def compile_only(self, grid):
        return lambda *args, **options: compiled.append(self.run(*args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(PretendDriver(capability))
    with mock.patch.object(triton.JITFunction, "__getitem__", compile_only):
        run()
    return list({id(kernel): kernel for kernel in compiled}.values())


def ssd_step(directions: str, dtype: torch.dtype, head_dim: int, d_state: int) -> None:
    """One training step on uninitialised numbers, with every option that adds code."""
    batch, num_frames, heads = 2, 16, 16
    tensor = functools.partial(torch.zeros, requires_grad=True)
    x = tensor(batch, num_frames, heads, head_dim, dtype=dtype)
    B, C = (tensor(batch, num_frames, 1, d_state, dtype=dtype) for _ in "BC")
    dt, A, D = tensor(batch, num_frames, 2, heads), tensor(2, heads), tensor(heads)
    lengths = torch.full((batch,), num_frames)
    options = {"lengths": lengths, "chunk_size": None}
    one = (x, dt[:, :, 0], A[0], B, C, D)
    if directions == "both":
        outputs = [ssd_bidirectional_triton(x, dt, A, B, C, D, **options)]
    elif directions == "pair":
        outputs = ssd_pair_triton(*zip(one, one, strict=True), **options)
    else:
        state = tensor(batch, heads, head_dim, d_state)
        outputs = ssd_triton(*one, reverse=False, initial_state=state, return_final_state=True, **options)[:1]
    sum(y.sum() for y in outputs).backward()


def gated_delta_step(decays: str, dtype: torch.dtype, head_dim: int, d_state: int) -> None:
    """The same; in reverse, which has more index arithmetic."""
    batch, num_frames, heads = 2, 16, 16
    tensor = functools.partial(torch.zeros, requires_grad=True)
    q, k = (tensor(batch, num_frames, 1, d_state, dtype=dtype) for _ in "qk")
    v = tensor(batch, num_frames, heads, head_dim, dtype=dtype)
    beta, g = tensor(batch, num_frames, heads), tensor(batch, num_frames, heads, *([d_state] * (decays == "channels")))
    options = {"lengths": torch.full((batch,), num_frames), "reverse": True, "chunk_size": None}
    state = tensor(batch, heads, head_dim, d_state)
    outputs = gated_delta_triton(q, k, v, beta, g, initial_state=state, return_final_state=True, **options)
    sum(v.sum() for v in outputs).backward()


# One training step of each, given dtype, head_dim and d_state.
SCANS = {name: functools.partial(ssd_step, name) for name in ("one", "both", "pair")}
SCANS |= {"delta": functools.partial(gated_delta_step, "heads")}
SCANS |= {"delta-channels": functools.partial(gated_delta_step, "channels")}


def check(capability: int, dtype: str, sizes: str, scan: str) -> Iterator[Usage]:
    head_dim, d_state = map(int, sizes.split("x"))
    step = functools.partial(SCANS[scan], DTYPES[dtype], head_dim, d_state)
    return map(usage_of, compiled_kernels(capability, step))


def check_all(
    capabilities: Iterable[int], dtypes: Iterable[str], sizes: Iterable[str], scans: Iterable[str]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """A row for each kernel of each case, and whether it needs no more shared memory than the GPU has."""
    for case in itertools.product(capabilities, dtypes, sizes, scans):
        for use in check(*case):
            row = dict(zip(("sm", "dtype", "P x N", "scan"), case, strict=True)) | {"kernel": use.kernel}
            row |= {"warps": use.warps, "registers": use.registers, "spilled B": use.spilled_bytes}
            fits = use.shared_bytes <= SHARED_KIB.get(case[0], 99) * 1024
            yield row | {"shared KiB": use.shared_bytes / 1024}, fits
