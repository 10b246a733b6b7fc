"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752): every entry of the state decays at its own rate."""

from torch import Tensor

from cald_speech.ops.arguments import check_scan
from cald_speech.ops.backends import Backend, Request, device_of, run_op, why_not_native, why_not_torch, why_not_triton

# Of the Triton kernels: a program holds some frames' (channels, d_state) in registers, and beyond this they spill.
MAX_D_STATE = 256


def why_not_selective_scan_triton(request: Request) -> str | None:
    """The reason that the kernels cannot run a request, or None.

    Example
    -------
    >>> import torch
    >>> why_not_selective_scan_triton(Request(torch.device("cpu"), torch.float64, {"d_state": 16})) is None
    False
    """
    if reason := why_not_triton(request):
        return reason
    if request.sizes.get("d_state", 1) > MAX_D_STATE:
        return f"its kernels go to d_state {MAX_D_STATE}, got {request.sizes['d_state']}: pass backend='torch'."
    return None


# Fastest first: ``auto`` takes the first that can run.
BACKENDS = {
    "triton": Backend("cald_speech.ops.selective_scan.triton", why_not_selective_scan_triton, auto_on=("cuda",)),
    "native": Backend("cald_speech.ops.selective_scan.native", why_not_native, auto_on=("cpu",)),
    "torch": Backend("cald_speech.ops.selective_scan.torch_blocked", why_not_torch),
    "naive": Backend("cald_speech.ops.selective_scan.naive", differentiable_forwards=True),
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
    >>> import torch
    >>> x, dt, A = torch.ones(1, 3, 1), torch.ones(1, 3, 1), -torch.tensor([[1e-9]])
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> selective_scan(x, dt, A, ones, ones).flatten().tolist()  # hardly any decay: a running sum
    [1.0, 2.0, 3.0]
    >>> selective_scan(x, dt, A, ones, ones, reverse=True, lengths=torch.tensor([2])).flatten().tolist()
    [2.0, 1.0, 0.0]
    """
    options = {"lengths": lengths, "initial_state": initial_state, "chunk_size": chunk_size}
    check_scan(x, dt, A, B, C, D, axes="(B, T, D_inner)", unit="channels", **options)
    options |= {"reverse": reverse, "return_final_state": return_final_state}
    sizes = lambda: {"d_state": B.size(3), "elements": max(x.numel(), B.numel())}  # noqa: E731
    request = lambda: Request(device_of(x), x.dtype, sizes())  # noqa: E731
    return run_op("selective_scan", backend, BACKENDS, request, x, dt, A, B, C, D, **options)
