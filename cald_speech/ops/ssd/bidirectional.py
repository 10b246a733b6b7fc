"""SSD in both directions over the same x, B and C: one pass that reads them once, for encoders.

Hydra (Hwang et al., arXiv 2407.09941) and any mixer whose directions share their projections have this shape: only the
step sizes and the decay rates differ between past and future. Within a chunk both directions are then *one* attention
matrix, with the past's decays below its diagonal and the future's above.
"""

import torch
from torch import Tensor

from cald_speech.ops.backends import Backend, Request, choose_backend
from cald_speech.ops.native import why_not_native
from cald_speech.ops.ssd.arguments import check_arguments
from cald_speech.ops.ssd.limits import why_not_triton_ssd

# Fastest first: ``auto`` takes the first that can run.
BACKENDS = {
    "triton": Backend("cald_speech.ops.ssd.triton:ssd_bidirectional_triton", why_not_triton_ssd, auto_on=("cuda",)),
    "native": Backend("cald_speech.ops.ssd.native:ssd_bidirectional_native", why_not_native, auto_on=("cpu",)),
    "torch": Backend("cald_speech.ops.ssd.torch_chunked:ssd_bidirectional_chunked"),
    "naive": Backend("cald_speech.ops.ssd.naive:ssd_bidirectional_naive"),
}


def ssd_bidirectional(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sum of :func:`cald_speech.ops.ssd` forwards and in reverse, with shared x, B and C.

    Arguments
    ---------
    x : (B, T, H, P) float tensor.
    dt : (B, T, 2, H) positive step sizes, forwards and backwards.
    A : (2, H) negative decay rates, forwards and backwards.
    B, C : (B, T, G, N), G dividing H.
    D : (H,) weight of the direct path, counted once, or None.
    lengths, chunk_size, backend : as in :func:`cald_speech.ops.ssd`.

    Returns
    -------
    y (B, T, H, P) in x's dtype: every frame sees itself twice, once in each direction.

    Raises
    ------
    ValueError
        names the argument that does not fit, what was expected and what came.

    Example
    -------
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> y = ssd_bidirectional(ones, torch.ones(1, 3, 2, 1), -torch.full((2, 1), 1e-9), ones, ones)
    >>> y.flatten().tolist()  # hardly any decay: three frames, and the present one once more
    [4.0, 4.0, 4.0]
    """
    if dt.dim() != 4 or dt.size(2) != 2 or A.dim() != 2 or A.size(0) != 2:
        raise ValueError(
            f"dt, A: expected a direction axis of 2, dt (B, T, 2, H) and A (2, H), got {tuple(dt.shape)} and "
            f"{tuple(A.shape)}"
        )
    for direction in range(2):
        check_arguments(x, dt[:, :, direction], A[direction], B, C, D, None, lengths)
    sizes = {"head_dim": x.size(3), "d_state": B.size(3), "elements": max(x.numel(), B.numel())}
    run = BACKENDS[choose_backend("ssd_bidirectional", backend, BACKENDS, Request(x.device, x.dtype, sizes))].load()
    with torch.autocast(x.device.type, enabled=False):
        return run(x, dt, A, B, C, D, lengths=lengths, chunk_size=chunk_size)
