"""State-space duality (SSD), the scan of Mamba-2 (Dao & Gu, arXiv 2405.21060)."""

import torch
from torch import Tensor

from cald_speech.ops.backends import Backend, Request, choose_backend
from cald_speech.ops.native import why_not_native
from cald_speech.ops.ssd.arguments import check_arguments
from cald_speech.ops.ssd.limits import why_not_triton_ssd
from cald_speech.ops.ssd.mamba_ssm import BACKEND as MAMBA_SSM

# Fastest first: ``auto`` takes the first that can run.
BACKENDS = {
    "triton": Backend("cald_speech.ops.ssd.triton:ssd_triton", why_not_triton_ssd, auto_on=("cuda",)),
    "native": Backend("cald_speech.ops.ssd.native:ssd_native", why_not_native, auto_on=("cpu",)),
    "torch": Backend("cald_speech.ops.ssd.torch_chunked:ssd_chunked"),
    "mamba_ssm": MAMBA_SSM,
    "naive": Backend("cald_speech.ops.ssd.naive:ssd_naive"),
}


def ssd(
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan ``S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T``, ``y_t = S_t C_t + D x_t`` over the frames, for each head.

    Arguments
    ---------
    x : (B, T, H, P) float tensor, the input; float32, bfloat16, float16 or float64.
    dt : (B, T, H) positive step sizes. dt <= 0 would make the scan grow; it is refused with ``CALD_SPEECH_DEBUG=1``
        alone, since looking costs a device sync.
    A : (H,) negative decay rates, checked in the same mode.
    B, C : (B, T, G, N) input and output maps of the state, G dividing H; head h reads group ``h // (H / G)``.
    D : (H,) weight of the direct path, or None for none.
    lengths : (B,) integers in [0, T], valid frames of each right-padded sequence. Padded frames are never read, and
        come out as zeros. None: all are valid.
    reverse : True scans every sequence from its last valid frame to its first.
    initial_state : (B, H, P, N), the state before the first frame of the scan; zeros if None.
    return_final_state : True returns the state after the last frame of the scan too.
    chunk_size : frames handled by one matrix product, None for the backend's best; it changes speed, not the result.
    backend : ``auto``, ``triton``, ``native``, ``torch``, ``mamba_ssm`` or ``naive``.

    Returns
    -------
    y (B, T, H, P) in x's dtype; with ``return_final_state`` also the state (B, H, P, N), float32 (float64 for
    float64 inputs). All arithmetic on decays is float32 or better, under autocast too; the
    ``triton`` backend multiplies bfloat16 inputs in bfloat16, which leaves final states good to some 4e-3.

    Raises
    ------
    ValueError
        names the argument whose shape, dtype or values do not fit, what was expected and what came.

    Example
    -------
    >>> x, dt, A = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1), -torch.tensor([1e-9])
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> ssd(x, dt, A, ones, ones).flatten().tolist()  # hardly any decay: a running sum
    [1.0, 2.0, 3.0]
    >>> ssd(x, dt, A, ones, ones, reverse=True, lengths=torch.tensor([2])).flatten().tolist()
    [2.0, 1.0, 0.0]
    """
    check_arguments(x, dt, A, B, C, D, initial_state, lengths)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    sizes = {"head_dim": x.size(3), "d_state": B.size(3), "elements": max(x.numel(), B.numel())}
    run = BACKENDS[choose_backend("ssd", backend, BACKENDS, Request(x.device, x.dtype, sizes))].load()
    with torch.autocast(x.device.type, enabled=False):
        return run(
            x,
            dt,
            A,
            B,
            C,
            D,
            lengths=lengths,
            reverse=reverse,
            initial_state=initial_state,
            return_final_state=return_final_state,
            chunk_size=chunk_size,
        )
