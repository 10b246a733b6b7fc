"""The selective scan for ``torch.export``: all states at once, in a fixed number of operations, for any length.

It holds several tensors of (B, T, D_inner, N), which the other backends never make.
"""

import torch

from cald_speech.ops.lengths import mask_padding
from cald_speech.ops.recurrence import recurrence

LEVELS = 5  # 16^5 frames: five hours at 50 a second


def selective_scan_traced(x, dt, A, B, C, D, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.selective_scan`, which documents arguments and result."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A frame with dt = 0 and x = 0 leaves the state as it is, in either direction.
    x, dt, B, C = (mask_padding(v, lengths) for v in (x, dt, B, C))
    per_group = x.size(2) // B.size(2)
    inputs, steps = x.to(dtype), dt.to(dtype)
    B, C = (v.to(dtype).repeat_interleave(per_group, dim=2) for v in (B, C))
    decays = (steps[..., None] * A.to(dtype)).exp()
    added = (steps * inputs)[..., None] * B
    if reverse:
        decays, added = decays.flip(1), added.flip(1)
    state = initial_state
    if state is None:
        state = inputs.new_zeros(x.size(0), *A.shape)
    states = recurrence(decays, added, state.to(dtype), levels=LEVELS)
    last = states[:, -1]
    y = ((states.flip(1) if reverse else states) * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * inputs
    y = mask_padding(y, lengths).to(x.dtype)
    return (y, last) if return_final_state else y
