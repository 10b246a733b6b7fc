"""Compiles the kernels of every op for GPUs that are not there.

Run without TRITON_INTERPRET as ``python -m tests.ops.compile_launches DTYPE CAPABILITY OP ...``, such as ``bfloat16
90 short_conv``; prints a line of JSON for each op: what the assembler says of every kernel that a training step
launches.
"""

import json
import sys
from dataclasses import asdict

import torch

from cald_speech.ops.selective_scan.triton import selective_scan_triton
from cald_speech.ops.short_conv.triton import short_conv_triton
from cald_speech.ops.triton.compile_check import SCANS, compiled_kernels, usage_of

# What adds code: reverse is the direction with more index arithmetic.
OPTIONS = {"lengths": torch.tensor([64, 3]), "reverse": True, "return_final_state": True}
SCAN = {"initial_state": None, "chunk_size": None}


def short_conv(dtype: torch.dtype) -> None:
    x, weight, bias, state = (
        torch.zeros(2, 64, 64, dtype=dtype),
        torch.zeros(64, 4),
        torch.zeros(64),
        torch.zeros(2, 64, 3),
    )
    leaves = [v.requires_grad_() for v in (x, weight, bias, state)]
    outputs = short_conv_triton(*leaves[:3], initial_state=state, activation="silu", **OPTIONS)
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(v) for v in outputs])


def selective_scan(dtype: torch.dtype) -> None:
    x, dt, A, D = torch.zeros(2, 64, 128, dtype=dtype), torch.zeros(2, 64, 128), torch.zeros(128, 16), torch.zeros(128)
    B, C = (torch.zeros(2, 64, 1, 16, dtype=dtype) for _ in "BC")
    leaves = [v.requires_grad_() for v in (x, dt, A, B, C, D)]
    outputs = selective_scan_triton(*leaves, **SCAN, **OPTIONS)
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(v) for v in outputs])


def main(dtype: str, capability: str, *ops: str) -> None:
    steps = {"short_conv": short_conv, "selective_scan": selective_scan}
    steps |= {name: lambda dtype, step=step: step(dtype, 64, 64) for name, step in SCANS.items()}
    for op in ops:
        kernels = compiled_kernels(int(capability), lambda op=op: steps[op](getattr(torch, dtype)))
        print(json.dumps([asdict(usage_of(kernel)) for kernel in kernels]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
