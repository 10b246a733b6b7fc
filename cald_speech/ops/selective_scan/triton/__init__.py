"""The selective scan in Triton: three launches forwards, five backwards, deterministic, no atomics.

What it holds beside inputs and outputs, in float32: forwards one state for each chunk. Backwards, where nothing but the
inputs is kept from the forward pass, three for each chunk of 16 frames, and the parts of the gradients of B and C, one
for each 128 channels at most.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cald_speech.ops.selective_scan import selective_scan
from cald_speech.ops.selective_scan.triton.launch import Scan
from cald_speech.ops.triton import mend_interpreter

mend_interpreter()


def selective_scan_triton(x, dt, A, B, C, D, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.selective_scan`, which documents arguments and result."""
    lengths = None if lengths is None else lengths.contiguous()
    D = None if D is None else D.contiguous()
    y, state = SelectiveScan.apply(x, dt, A, B, C, D, initial_state, lengths, reverse, chunk_size)
    return (y, state) if return_final_state else y


def warmup(
    channels: int,
    d_state: int = 16,
    groups: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: str = "cuda",
    dt_dtype: torch.dtype = torch.float32,
    directions: tuple[bool, ...] = (False, True),
    padded: tuple[bool, ...] = (True,),
) -> None:
    """Compile all kernels, so that the first real call need not.

    directions : which values of ``reverse`` to compile for.
    padded : whether with lengths, without, or both.

    A call with an initial state or without D compiles the kernels that see it once more.
    """
    x, dt = (torch.zeros(1, 16, channels, dtype=kind, device=device, requires_grad=True) for kind in (dtype, dt_dtype))
    A, D = (torch.zeros(*shape, device=device) for shape in ((channels, d_state), (channels,)))
    B, C = (torch.zeros(1, 16, groups, d_state, dtype=dtype, device=device) for _ in range(2))
    for reverse in directions:
        for with_lengths in padded:
            lengths = torch.full((1,), 16, device=device) if with_lengths else None
            y = selective_scan(x, dt, A, B, C, D, lengths=lengths, reverse=reverse, backend="triton")
            torch.autograd.grad(y, (x, dt), torch.zeros_like(y))


class SelectiveScan(torch.autograd.Function):
    """Saves its inputs alone."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, reverse, chunk_size = arguments
        ctx.save_for_backward(*tensors)
        ctx.reverse = reverse
        return Scan(*tensors, reverse).run(chunk_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        return *Scan(*ctx.saved_tensors, ctx.reverse).run_backward(grad_y, grad_state), None, None, None
