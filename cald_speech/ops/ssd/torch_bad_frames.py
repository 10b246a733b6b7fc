"""A scan whose bad frames are kept from those before them (:mod:`cald_speech.ops.bad_frames`).

A bad frame's own output is not finite: so one look at the outputs says whether any frame is bad, and the scan of a
batch that has none costs hardly more.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cald_speech.ops.bad_frames import all_finite, without, write_before
from cald_speech.ops.lengths import mask_padding

Scan = Callable[..., tuple[Tensor, Tensor]]
"""From x, dt, A, B, C, D to y and the final state; takes ``lengths`` and ``reverse`` among its options."""


def keep_from_earlier_frames(scan: Scan, x, dt, A, B, C, D, **options) -> tuple[Tensor, Tensor]:
    """What ``scan`` returns; where a frame is bad, the outputs before it are written anew by a scan without bad frames.

    Waits for the device, where that is not the CPU.
    """
    y, state = scan(x, dt, A, B, C, D, **options)
    if x.size(1) > 1 and not all_finite(y):
        with torch.no_grad():  # the gradients are those of the scan as it was
            write_unspoilt(y, scan, x, dt, A, B, C, D, **options)
    return y, state


def write_unspoilt(y: Tensor, scan: Scan, x, dt, A, B, C, D, *, lengths, reverse, **options) -> None:
    """Into ``y`` (B, T, H, P), at the frames that come before every bad one of their head and feature."""
    bad_steps, bad_maps = (mask_padding(~torch.isfinite(v), lengths) for v in (dt, B))
    dtype = torch.promote_types(x.dtype, torch.float32)
    weighted = x.to(dtype) * dt.to(dtype)[..., None]  # what is summed, and may be infinite where neither is
    bad_inputs = mask_padding(~(weighted.abs() < torch.finfo(dtype).max / 2), lengths)
    x, dt, clean_B = without(x, bad_inputs), without(dt, bad_steps), without(B, bad_maps)
    unspoilt, _ = scan(x, dt, A, clean_B, C, D, lengths=lengths, reverse=reverse, **options)
    bad = bad_inputs | bad_maps.any(-1).repeat_interleave(x.size(2) // B.size(2), dim=2)[..., None]
    write_before(y, bad, unspoilt, reverse=reverse)
