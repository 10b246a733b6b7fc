"""Both directions by two scans: ``ssd_bidirectional`` and ``ssd_pair`` of a backend that runs one scan at a time."""

from collections.abc import Callable

from torch import Tensor

from cald_speech.ops.ssd import Pair

NO_STATE = {"initial_state": None, "return_final_state": False}


def bidirectional_by(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """:func:`cald_speech.ops.ssd_bidirectional` by a backend's ``ssd``: one scan after the other, summed."""

    def ssd_bidirectional(x, dt, A, B, C, D, **options):
        past = scan(x, dt[:, :, 0], A[0], B, C, D, reverse=False, **NO_STATE, **options)
        return past + scan(x, dt[:, :, 1], A[1], B, C, None, reverse=True, **NO_STATE, **options)

    return ssd_bidirectional


def pair_by(scan: Callable[..., Tensor]) -> Callable[..., Pair]:
    """:func:`cald_speech.ops.ssd_pair` by a backend's ``ssd``: one scan after the other."""

    def ssd_pair(x, dt, A, B, C, D, **options):
        past, future = zip(x, dt, A, B, C, D or (None, None), strict=True)
        return scan(*past, reverse=False, **NO_STATE, **options), scan(*future, reverse=True, **NO_STATE, **options)

    return ssd_pair
