"""SSD by the upstream Triton kernels of the package mamba-ssm, behind our signature: a yardstick and a second opinion.

``mamba_chunk_scan_combined`` (Dao & Gu, arXiv 2405.21060; state-spaces/mamba) knows neither lengths nor a direction.
Padding becomes frames with dt = 0 and x = B = C = 0, which leave the state as it is; ``reverse`` gathers the valid
frames of each sequence in opposite order, before and after, as the reference implementations do.

``auto`` never takes it. It autotunes on its first call for each size, sums some gradients with atomics (two runs can
differ in the last bits), multiplies float32 in TF32 (errors near 1e-3), and holds its offsets in 32 bits.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from cald_speech.ops.backends import Backend, Request
from cald_speech.ops.lengths import mask_padding

# The kernels compute element offsets in int32: from here on they wrap around, and read and write elsewhere.
MOST_ELEMENTS = 2**31 - 1
CHUNK_SIZE = 256  # what the reference Mamba-2 models use
INSTALL = "pip install --no-build-isolation mamba-ssm (MAMBA_SKIP_CUDA_BUILD=TRUE where there is no nvcc)"


def why_not_mamba_ssm(request: Request) -> str | None:
    """Why the upstream kernels cannot run a request, with the way out, or None where they can.

    Example
    -------
    >>> why_not_mamba_ssm(Request(torch.device("cpu"), torch.float32)) is None
    False
    """
    if importlib.util.find_spec("mamba_ssm") is None:
        return f"the package mamba-ssm is not installed: {INSTALL}, or pass backend='auto'."
    if request.device.type != "cuda":
        return f"its kernels need a CUDA device, and the tensors are on {request.device}: pass backend='auto'."
    if request.dtype == torch.float64:
        return "it has no float64, which is for gradient checks: pass backend='torch'."
    if (elements := request.sizes.get("elements", 0)) > MOST_ELEMENTS:
        return _too_many("the largest input", elements)
    return None


BACKEND = Backend("cald_speech.ops.ssd.mamba_ssm:ssd_mamba_ssm", why_not_mamba_ssm, auto_on=())


def ssd_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same signature and result as :func:`cald_speech.ops.ssd`, which documents it.

    B and C are multiplied in the dtype of x; chunk_size None is 256. Raises ValueError where a tensor of the kernels
    would pass 2^31 elements.
    """
    chunk_size = chunk_size or CHUNK_SIZE
    check_offsets(x, B, C, chunk_size)
    if initial_state is None:
        initial_state = x.new_zeros(x.size(0), x.size(2), x.size(3), B.size(3), dtype=torch.float32)
    if not x.size(1):
        return (x, initial_state.float()) if return_final_state else x
    # masked_fill, not a product: a NaN at the padding must not live on, and B and C meet the state there.
    x, dt, B, C = (mask_padding(v, lengths) for v in (x, dt.float(), B.to(x.dtype), C.to(x.dtype)))
    if reverse:
        x, dt, B, C = (flip_valid(v, lengths) for v in (x, dt, B, C))
    y, state = upstream()(
        x,
        dt,
        A.float(),
        B,
        C,
        chunk_size,
        D=None if D is None else D.float(),
        initial_states=initial_state.float(),
        dt_softplus=False,
        return_final_states=True,
    )
    y = mask_padding(flip_valid(y, lengths) if reverse else y, lengths)
    return (y, state.float()) if return_final_state else y


def flip_valid(v: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sequence of ``v`` (B, T, ...) with its valid frames in opposite order; padding stays where it is.

    Example
    -------
    >>> flip_valid(torch.tensor([[1, 2, 3, 0]]), torch.tensor([3])).tolist()
    [[3, 2, 1, 0]]
    """
    if lengths is None:
        return v.flip(1)
    frames = torch.arange(v.size(1), device=v.device)
    index = torch.where(frames < lengths[:, None], lengths[:, None] - 1 - frames, frames)
    return v.gather(1, index.reshape(*index.shape, *(1,) * (v.dim() - 2)).expand(v.shape))


def check_offsets(x: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> None:
    """Raise ValueError where an offset of the kernels, into their inputs or their scratch, would pass 2^31.

    The scratch of the backward pass counts also where no gradient is asked for: it is the largest, and a forward pass
    that works where training does not would surprise.
    """
    batch, num_frames, heads, head_dim = x.shape
    chunks = -(-num_frames // chunk_size)
    per_frame = batch * chunks * chunk_size * heads
    counts = {
        "x, as far as its strides reach,": _reach(x),
        "B, as far as its strides reach,": _reach(B),
        "C, as far as its strides reach,": _reach(C),
        "batch x frames x heads x chunk_size": per_frame * chunk_size,
        "batch x frames x heads x d_state": per_frame * B.size(3),
        "batch x chunks x heads x head_dim x d_state": batch * chunks * heads * head_dim * B.size(3),
    }
    for what, count in counts.items():
        if count > MOST_ELEMENTS:
            raise ValueError(f"backend: ssd cannot run with 'mamba_ssm' here: {_too_many(what, count)}")


@functools.cache
def upstream() -> Callable:
    """mamba-ssm's ``mamba_chunk_scan_combined``. Its Triton kernels need none of its CUDA extensions.

    Releases before 2.3 import the extension ``selective_scan_cuda`` at the top of the package. Where that was not
    built, an empty module stands in for it during the import alone: nobody else finds it in ``sys.modules``, and
    upstream's own Mamba-1 functions fail when they are called, as they would anyway.
    """
    name = "selective_scan_cuda"
    stub = name not in sys.modules and importlib.util.find_spec(name) is None
    if stub:
        sys.modules[name] = ModuleType(name, "stands in for mamba-ssm's CUDA extension while mamba-ssm is imported")
    try:
        return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    finally:
        if stub:
            del sys.modules[name]


def _reach(v: Tensor) -> int:
    """Elements from the first of a strided tensor to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(v.shape, v.stride(), strict=True)) if v.numel() else 0


def _too_many(what: str, count: int) -> str:
    return (
        f"{what} comes to {count:,} elements, and the upstream kernels hold offsets in 32 bits, up to "
        f"{MOST_ELEMENTS:,}. Use a smaller batch, shorter pieces (return_final_state and initial_state carry on), or "
        "another backend."
    )
