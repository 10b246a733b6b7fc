"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752): every entry of the state decays at its own rate."""

import torch
from torch import Tensor

from cald_speech.ops.backends import Backend, Request, choose_backend
from cald_speech.ops.lengths import check_lengths
from cald_speech.ops.native import why_not_native
from cald_speech.ops.selective_scan.arguments import check_arguments, check_values
from cald_speech.ops.selective_scan.limits import why_not_selective_scan_triton

# Fastest first: ``auto`` takes the first that can run.
BACKENDS = {
    "triton": Backend(
        "cald_speech.ops.selective_scan.triton:selective_scan_triton",
        why_not=why_not_selective_scan_triton,
        auto_on=("cuda",),
    ),
    "native": Backend("cald_speech.ops.selective_scan.native:selective_scan_native", why_not_native, auto_on=("cpu",)),
    "torch": Backend("cald_speech.ops.selective_scan.torch_blocked:selective_scan_chunked"),
    "naive": Backend("cald_speech.ops.selective_scan.naive:selective_scan_naive"),
}


def selective_scan(
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
    """Scan ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = <h_t, C_t> + D x_t`` over the frames, per channel.

    Arguments
    ---------
    x : (B, T, D_inner) float tensor, the input; float32, bfloat16, float16 or float64.
    dt : (B, T, D_inner) positive step sizes. dt <= 0 would make the scan grow; it is refused with
        ``CALD_SPEECH_DEBUG=1`` alone, since looking costs a device sync.
    A : (D_inner, N) negative decay rates, checked in the same mode.
    B, C : (B, T, G, N) input and output maps of the state, G dividing D_inner; channel d reads group
        ``d // (D_inner / G)``.
    D : (D_inner,) weight of the direct path, or None for none.
    lengths : (B,) integers in [0, T], valid frames of each right-padded sequence. Padded frames are never read, and
        come out as zeros. None: all are valid.
    reverse : True scans every sequence from its last valid frame to its first.
    initial_state : (B, D_inner, N), the state before the first frame of the scan; zeros if None.
    return_final_state : True returns the state after the last frame of the scan too.
    chunk_size : the most frames worked on at a time, None for the backend's best; it changes speed and memory, not the
        result.
    backend : ``auto``, ``triton``, ``native``, ``torch`` or ``naive``.

    Returns
    -------
    y (B, T, D_inner) in x's dtype; with ``return_final_state`` also the state (B, D_inner, N), float32 (float64 for
    float64 inputs). All arithmetic on states and decays is float32 or better, under autocast too.

    Raises
    ------
    ValueError
        names the argument whose shape, dtype or values do not fit, what was expected and what came.

    Example
    -------
    >>> x, dt, A = torch.ones(1, 3, 1), torch.ones(1, 3, 1), -torch.tensor([[1e-9]])
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> selective_scan(x, dt, A, ones, ones).flatten().tolist()  # hardly any decay: a running sum
    [1.0, 2.0, 3.0]
    >>> selective_scan(x, dt, A, ones, ones, reverse=True, lengths=torch.tensor([2])).flatten().tolist()
    [2.0, 1.0, 0.0]
    """
    check_arguments(x, dt, A, B, C, D, initial_state)
    check_lengths(lengths, x.size(0), x.size(1))
    check_values(dt, A, lengths)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    sizes = {"d_state": B.size(3), "elements": max(x.numel(), B.numel())}
    run = BACKENDS[choose_backend("selective_scan", backend, BACKENDS, Request(x.device, x.dtype, sizes))].load()
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
