"""Mamba's selective scan, frame by frame: the definition that every fast path is tested against.

Each of D channels d keeps a state h_d in R^N and at every frame t (Gu & Dao, "Mamba: Linear-Time Sequence Modeling with
Selective State Spaces", arXiv 2312.00752, eq. 2 and algorithm 2, with B discretised as dt B)

    h_t[d] = exp(dt_t[d] A[d]) h_{t-1}[d] + dt_t[d] x_t[d] B_t
    y_t[d] = <h_t[d], C_t> + D[d] x_t[d]

With A < 0 and dt > 0 every decay exp(dt A) lies in (0, 1); unlike in Mamba-2 it differs between the N entries of one
channel's state. Channels share B and C in groups: channel d reads group d // (D / G). ``reverse`` runs the same
recurrence from the last valid frame to the first.
"""

import torch
from torch import Tensor

from cald_speech.ops.lengths import mask_padding


def selective_scan_naive(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of the recurrence for each frame. Same signature as :func:`cald_speech.ops.selective_scan`.

    ``chunk_size`` is accepted for that reason and changes nothing. Example: see there.
    """
    batch, num_frames, channels = x.shape
    groups, d_state = B.shape[2:]
    # 1. Arithmetic in float32 (or float64, for gradient checks): decays near 1 are lost in half precision.
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Padding is overwritten before it is computed with: torch.where alone would let a NaN there into the gradients.
    x, dt, B, C = (mask_padding(v, lengths) for v in (x, dt, B, C))
    inputs, dt, A = x.to(dtype), dt.to(dtype), A.to(dtype)
    D = None if D is None else D.to(dtype)  # once: a gradient is added up over the frames in this dtype
    B, C = (v.to(dtype).repeat_interleave(channels // groups, dim=2) for v in (B, C))
    state = inputs.new_zeros(batch, channels, d_state) if initial_state is None else initial_state.to(dtype)
    if lengths is None:
        lengths = torch.full((batch,), num_frames, device=x.device)
    # 2. The recurrence. A frame past the end of its sequence leaves the state alone and puts out zero.
    outputs = [None] * num_frames
    for t in reversed(range(num_frames)) if reverse else range(num_frames):
        decay = torch.exp(dt[:, t, :, None] * A)
        update = (dt[:, t] * inputs[:, t])[..., None] * B[:, t]
        valid = (t < lengths)[:, None, None]
        state = torch.where(valid, decay * state + update, state)
        y = (state * C[:, t]).sum(-1)
        if D is not None:
            y = y + D * inputs[:, t]
        outputs[t] = torch.where(valid[..., 0], y, 0.0)
    # 3. Back to the input's dtype; the state stays in float32, since it is carried on.
    y = torch.stack(outputs, dim=1).to(x.dtype) if num_frames else x.clone()
    return (y, state) if return_final_state else y
