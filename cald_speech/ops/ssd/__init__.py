"""State-space duality (SSD), the scan of Mamba-2 (Dao & Gu, arXiv 2405.21060): one direction, both, or a pair.

Three ops, one table of backends, one check, one dispatch. ``ssd`` scans forwards or in reverse. For encoders there are
two ways of both directions at once:

- ``ssd_bidirectional``: mixers whose directions share x, B and C (Hydra, Hwang et al., arXiv 2407.09941), so that only
  step sizes and decay rates differ. Within a chunk both are then *one* attention matrix, with the past's decays below
  its diagonal and the future's above, and one pass reads the inputs once.
- ``ssd_pair``: two whole layers, one of them backwards (CALD's BiMamba2, arXiv 2410.06846). They share no input that
  could be read once for both; but on a GPU one series of launches serves them, with twice the programs in each.
"""

from torch import Tensor

from cald_speech.ops.arguments import check_scan
from cald_speech.ops.backends import (
    Backend,
    Request,
    check_is_tensor,
    device_of,
    run_op,
    why_not_native,
    why_not_torch,
    why_not_triton,
)

Pair = tuple[Tensor, Tensor]
"""Of the past and of the future."""

# Of the Triton kernels: the largest piece of a head, and the largest state.
MAX_PART = 64
MAX_STATE = 128


def head_parts(head_dim: int, largest: int = MAX_PART) -> int | None:
    """Into how many equal parts a head is cut so that none exceeds ``largest``; None where parts were under 16.

    A head of size P is the same as k heads of size P / k with its dt, A, B and C: rows of a state do not mix.

    Example
    -------
    >>> head_parts(64), head_parts(128), head_parts(80), head_parts(67)
    (1, 2, 2, None)
    """
    if head_dim <= largest:
        return 1
    return next((k for k in range(2, head_dim // 16 + 1) if head_dim % k == 0 and head_dim // k <= largest), None)


def why_not_triton_ssd(request: Request) -> str | None:
    """Why the SSD kernels cannot run a request, with the way out, or None where they can.

    Example
    -------
    >>> import torch
    >>> why_not_triton_ssd(Request(torch.device("cpu"), torch.float64)) is None
    False
    """
    if reason := why_not_triton(request):
        return reason
    head_dim, d_state = request.sizes.get("head_dim", 1), request.sizes.get("d_state", 1)
    if head_parts(head_dim) is None or d_state > MAX_STATE:
        return (
            f"its kernels take a head_dim up to {MAX_PART}, or one that splits into equal parts of 16 to {MAX_PART}, "
            f"and a d_state up to {MAX_STATE}; got head_dim {head_dim} and d_state {d_state}. Choose sizes within "
            "these limits or pass backend='torch'."
        )
    return None


# Of all three ops. Fastest first: ``auto`` takes the first that can run.
BACKENDS = {
    "triton": Backend("cald_speech.ops.ssd.triton", why_not_triton_ssd, auto_on=("cuda",)),
    "native": Backend("cald_speech.ops.ssd.native", why_not_native, auto_on=("cpu",)),
    "torch": Backend("cald_speech.ops.ssd.torch_chunked", why_not_torch),
    "naive": Backend("cald_speech.ops.ssd.naive", differentiable_forwards=True),
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
    backend : ``auto``, ``triton``, ``native``, ``torch`` or ``naive``.

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
    >>> import torch
    >>> x, dt, A = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1), -torch.tensor([1e-9])
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> ssd(x, dt, A, ones, ones).flatten().tolist()  # hardly any decay: a running sum
    [1.0, 2.0, 3.0]
    >>> ssd(x, dt, A, ones, ones, reverse=True, lengths=torch.tensor([2])).flatten().tolist()
    [2.0, 1.0, 0.0]
    """
    check(x, dt, A, B, C, D, lengths=lengths, initial_state=initial_state, chunk_size=chunk_size)
    options = {"lengths": lengths, "reverse": reverse, "chunk_size": chunk_size}
    options |= {"initial_state": initial_state, "return_final_state": return_final_state}
    return run_op("ssd", backend, BACKENDS, lambda: request_of(x, B), x, dt, A, B, C, D, **options)


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
    >>> import torch
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> y = ssd_bidirectional(ones, torch.ones(1, 3, 2, 1), -torch.full((2, 1), 1e-9), ones, ones)
    >>> y.flatten().tolist()  # hardly any decay: three frames, and the present one once more
    [4.0, 4.0, 4.0]
    """
    for name, v in {"dt": dt, "A": A}.items():
        check_is_tensor(name, v)
    if dt.dim() != 4 or dt.size(2) != 2 or A.dim() != 2 or A.size(0) != 2:
        raise ValueError(
            f"dt, A: expected a direction axis of 2, dt (B, T, 2, H) and A (2, H), got {tuple(dt.shape)} and "
            f"{tuple(A.shape)}"
        )
    options = {"lengths": lengths, "chunk_size": chunk_size}
    for direction in range(2):
        check(x, dt[:, :, direction], A[direction], B, C, D, **options)
    return run_op("ssd_bidirectional", backend, BACKENDS, lambda: request_of(x, B), x, dt, A, B, C, D, **options)


def ssd_pair(
    x: Pair,
    dt: Pair,
    A: Pair,
    B: Pair,
    C: Pair,
    D: Pair | None = None,
    *,
    lengths: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Pair:
    """Two scans of :func:`cald_speech.ops.ssd` in one call, the first forwards and the second in reverse.

    Arguments
    ---------
    x, dt, A, B, C, D : a pair (past, future) of what ``ssd`` takes: x (B, T, H, P), dt (B, T, H) > 0, A (H,) < 0,
        B and C (B, T, G, N), D (H,), or None for no direct path in either. Both of a pair have the same shape, dtype
        and device; their strides may differ, and nothing is copied for it.
    lengths : (B,) integers in [0, T] for both, as in ``ssd``.
    chunk_size, backend : as in ``ssd``.

    Returns
    -------
    (y_past, y_future), each (B, T, H, P) in the dtype of x.

    Raises
    ------
    ValueError
        names the argument that does not fit, what was expected and what came.

    Example
    -------
    >>> import torch
    >>> ones, steps, rates = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1), -torch.tensor([1e-9])
    >>> past, future = ssd_pair((ones, 2 * ones), (steps, steps), (rates, rates), (ones, ones), (ones, ones))
    >>> past.flatten().tolist(), future.flatten().tolist()  # hardly any decay: running sums, to either side
    ([1.0, 2.0, 3.0], [6.0, 4.0, 2.0])
    """
    pairs = {"x": x, "dt": dt, "A": A, "B": B, "C": C} | ({} if D is None else {"D": D})
    for name, pair in pairs.items():
        check_pair(name, pair)
    options = {"lengths": lengths, "chunk_size": chunk_size}
    for scan in zip(x, dt, A, B, C, D or (None, None), strict=True):
        check(*scan, **options)
    return run_op("ssd_pair", backend, BACKENDS, lambda: request_of(x[0], B[0]), x, dt, A, B, C, D, **options)


def check(x, dt, A, B, C, D, **options) -> None:
    """Raise ValueError where the arguments of one scan do not fit together."""
    check_scan(x, dt, A, B, C, D, axes="(B, T, H, P)", unit="heads", **options)


def check_pair(name: str, pair: Pair) -> None:
    """Raise ValueError unless ``pair`` is two tensors of one shape, dtype and device.

    Example
    -------
    >>> import torch
    >>> check_pair("A", (torch.ones(2), torch.ones(3)))
    Traceback (most recent call last):
    ...
    ValueError: A: expected past and future of one shape, dtype and device, got (2,) torch.float32 on cpu and (3,) \
torch.float32 on cpu
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(v, Tensor) for v in pair):
        got = f"{len(pair)} of them" if isinstance(pair, tuple | list) else type(pair).__name__
        raise ValueError(f"{name}: expected a pair of tensors, past and future, got {got}")
    past, future = (f"{tuple(v.shape)} {v.dtype} on {v.device}" for v in pair)
    if past != future:
        raise ValueError(f"{name}: expected past and future of one shape, dtype and device, got {past} and {future}")


def request_of(x: Tensor, B: Tensor) -> Request:
    """What a backend is asked before it is chosen."""
    sizes = {"head_dim": x.size(3), "d_state": B.size(3), "elements": max(x.numel(), B.numel())}
    return Request(device_of(x), x.dtype, sizes)
