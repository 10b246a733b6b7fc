"""State-space duality (SSD), the scan of Mamba-2 (Dao & Gu, arXiv 2405.21060)."""

import torch
from torch import Tensor

from cald_speech.ops.backends import choose_backend
from cald_speech.ops.lengths import check_lengths
from cald_speech.ops.ssd.chunked import ssd_chunked
from cald_speech.ops.ssd.naive import ssd_naive

BACKENDS = {"naive": ssd_naive, "torch": ssd_chunked}


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
    chunk_size: int = 64,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan ``S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T``, ``y_t = S_t C_t + D x_t`` over the frames, for each head.

    Arguments
    ---------
    x : (B, T, H, P) float tensor, the input; float32, bfloat16, float16 or float64.
    dt : (B, T, H) positive step sizes. dt <= 0 is not checked here (it would cost a device sync): the scan would grow.
    A : (H,) negative decay rates. A >= 0 is not checked either, for the same reason.
    B, C : (B, T, G, N) input and output maps of the state, G dividing H; head h reads group ``h // (H / G)``.
    D : (H,) weight of the direct path, or None for none.
    lengths : (B,) integers in [0, T], valid frames of each right-padded sequence. Padded frames are never read, and
        come out as zeros. None: all are valid.
    reverse : True scans every sequence from its last valid frame to its first.
    initial_state : (B, H, P, N), the state before the first frame of the scan; zeros if None.
    return_final_state : True returns the state after the last frame of the scan too.
    chunk_size : frames handled by one matrix product; it changes speed, not the result.
    backend : ``auto``, ``torch`` or ``naive``.

    Returns
    -------
    y (B, T, H, P) in x's dtype; with ``return_final_state`` also the state (B, H, P, N), float32 (float64 for
    float64 inputs). All arithmetic on states and decays is float32 or better, under autocast too.

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
    _check_shapes(x, dt, A, B, C, D, initial_state)
    check_lengths(lengths, x.size(0), x.size(1))
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    run = BACKENDS[choose_backend("ssd", backend, tuple(BACKENDS))]
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


def _check_shapes(x, dt, A, B, C, D, initial_state) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected a float tensor (B, T, H, P), got {x.dtype} of shape {tuple(x.shape)}")
    if B.dim() != 4:
        raise ValueError(f"B: expected (B, T, G, N), got shape {tuple(B.shape)}")
    batch, num_frames, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"B: expected a number of groups that divides the {heads} heads, got {groups}")
    expected = {
        "dt": (dt, (batch, num_frames, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, num_frames, groups, d_state)),
        "C": (C, (batch, num_frames, groups, d_state)),
        "D": (D, (heads,)),
        "initial_state": (initial_state, (batch, heads, head_dim, d_state)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape} to go with x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} like x, got {tensor.device}")
