"""SSD forwards and in reverse over inputs of their own, side by side: for encoders with a projection per direction.

CALD's BiMamba2 (arXiv 2410.06846) has this shape: two whole Mamba-2 layers, one of them backwards. They share no input
that could be read once for both; but on a GPU one series of launches serves them, with twice the programs in each.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cald_speech.ops.backends import Backend, Request, choose_backend
from cald_speech.ops.native import why_not_native
from cald_speech.ops.ssd.arguments import check_arguments
from cald_speech.ops.ssd.limits import why_not_triton_ssd
from cald_speech.ops.ssd.mamba_ssm import BACKEND as MAMBA_SSM
from cald_speech.ops.ssd.mamba_ssm import ssd_mamba_ssm
from cald_speech.ops.ssd.naive import ssd_naive
from cald_speech.ops.ssd.torch_chunked import ssd_chunked

Pair = tuple[Tensor, Tensor]

# Fastest first: ``auto`` takes the first that can run.
BACKENDS = {
    "triton": Backend("cald_speech.ops.ssd.triton:ssd_pair_triton", why_not_triton_ssd, auto_on=("cuda",)),
    "native": Backend("cald_speech.ops.ssd.native:ssd_pair_native", why_not_native, auto_on=("cpu",)),
    "torch": Backend("cald_speech.ops.ssd.pair:ssd_pair_chunked"),
    "mamba_ssm": replace(MAMBA_SSM, location="cald_speech.ops.ssd.pair:ssd_pair_mamba_ssm"),
    "naive": Backend("cald_speech.ops.ssd.pair:ssd_pair_naive"),
}


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
    >>> ones, steps, rates = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1), -torch.tensor([1e-9])
    >>> past, future = ssd_pair((ones, 2 * ones), (steps, steps), (rates, rates), (ones, ones), (ones, ones))
    >>> past.flatten().tolist(), future.flatten().tolist()  # hardly any decay: running sums, to either side
    ([1.0, 2.0, 3.0], [6.0, 4.0, 2.0])
    """
    pairs = {"x": x, "dt": dt, "A": A, "B": B, "C": C} | ({} if D is None else {"D": D})
    for name, pair in pairs.items():
        check_pair(name, pair)
    for scan in scans_of(x, dt, A, B, C, D):
        check_arguments(*scan, None, lengths)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    x_past, B_past = x[0], B[0]
    sizes = {"head_dim": x_past.size(3), "d_state": B_past.size(3), "elements": max(x_past.numel(), B_past.numel())}
    request = Request(x_past.device, x_past.dtype, sizes)
    run = BACKENDS[choose_backend("ssd_pair", backend, BACKENDS, request)].load()
    with torch.autocast(x_past.device.type, enabled=False):
        return run(x, dt, A, B, C, D, lengths=lengths, chunk_size=chunk_size)


def check_pair(name: str, pair: Pair) -> None:
    """Raise ValueError unless ``pair`` is two tensors of one shape, dtype and device.

    Example
    -------
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


def scans_of(x: Pair, dt: Pair, A: Pair, B: Pair, C: Pair, D: Pair | None) -> list[tuple[Tensor | None, ...]]:
    """The arguments of either scan, past and future."""
    return list(zip(x, dt, A, B, C, (None, None) if D is None else D, strict=True))


def two_calls(
    scan: Callable[..., Tensor], x: Pair, dt: Pair, A: Pair, B: Pair, C: Pair, D: Pair | None = None, **options
) -> Pair:
    """What :func:`ssd_pair` gives, by a backend of ``ssd`` that runs one scan at a time."""
    past, future = scans_of(x, dt, A, B, C, D)
    return scan(*past, **options), scan(*future, **options, reverse=True)


def ssd_pair_chunked(*pairs: Pair | None, **options) -> Pair:
    """Same arguments and result as :func:`ssd_pair`: two scans in chunks."""
    return two_calls(ssd_chunked, *pairs, **options)


def ssd_pair_mamba_ssm(*pairs: Pair | None, **options) -> Pair:
    """Same arguments and result as :func:`ssd_pair`: two scans by the upstream kernels."""
    return two_calls(ssd_mamba_ssm, *pairs, **options)


def ssd_pair_naive(*pairs: Pair | None, **options) -> Pair:
    """Same arguments and result as :func:`ssd_pair`: two recurrences, frame by frame, that it is tested against."""
    return two_calls(ssd_naive, *pairs, **options)
