"""State-space duality (SSD), frame by frame: the definition that every fast path is tested against.

Each head h keeps a state S in R^{P x N} and at every frame t (Dao & Gu, "Transformers are SSMs", arXiv 2405.21060,
eq. 1 after discretisation)

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T
    y_t = S_t C_t + D x_t

With A < 0 and dt > 0 the decay exp(dt A) lies in (0, 1). Heads share B and C in groups: head h reads group
h // (H / G). ``reverse`` runs the same recurrence from the last valid frame to the first.

Unrolled from S = 0, every output is a weighted sum of the inputs before it, and of its own:

    y_t = sum_{s <= t} (C_t . B_s) exp(sum_{s < r <= t} dt_r A) dt_s x_s + D x_t

That is attention with queries C, keys B, values dt x and a decay in the place of the softmax, the duality of the name.
A recurrence costs T steps one after the other, attention T^2 products: the fast paths take the attention within chunks
of frames and the recurrence from chunk to chunk. ``torch_batched.py`` has this as the paper lists it, in four steps.
"""

import torch
from torch import Tensor

from cald_speech.ops.lengths import mask_padding
from cald_speech.ops.ssd.two_scans import bidirectional_by, pair_by


def ssd_naive(
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
    """One step of the recurrence for each frame. Same signature as :func:`cald_speech.ops.ssd`, which documents it.

    ``chunk_size`` is accepted for that reason and changes nothing. Example: see there.
    """
    batch, num_frames, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    # 1. Arithmetic in float32 (or float64, for gradient checks): decays near 1 are lost in half precision.
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Padding is overwritten before it is computed with: torch.where alone would let a NaN there into the gradients.
    x, dt, B, C = (mask_padding(v, lengths) for v in (x, dt, B, C))
    inputs, dt, A = x.to(dtype), dt.to(dtype), A.to(dtype)
    D = None if D is None else D.to(dtype)  # once: a gradient is added up over the frames in this dtype
    B, C = (v.to(dtype).repeat_interleave(heads // groups, dim=2) for v in (B, C))
    state = inputs.new_zeros(batch, heads, head_dim, d_state) if initial_state is None else initial_state.to(dtype)
    if lengths is None:
        lengths = torch.full((batch,), num_frames, device=x.device)
    # 2. The recurrence. A frame past the end of its sequence leaves the state alone and puts out zero.
    outputs = [None] * num_frames
    for t in reversed(range(num_frames)) if reverse else range(num_frames):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        update = (dt[:, t, :, None] * inputs[:, t])[..., None] * B[:, t, :, None, :]
        valid = (t < lengths)[:, None, None, None]
        state = torch.where(valid, decay * state + update, state)
        y = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
        if D is not None:
            y = y + D[:, None] * inputs[:, t]
        outputs[t] = torch.where(valid[..., 0], y, 0.0)
    # 3. Back to the input's dtype; the state stays in float32, since it is carried on.
    y = torch.stack(outputs, dim=1).to(x.dtype) if num_frames else x.clone()
    return (y, state) if return_final_state else y


ssd_bidirectional_naive = bidirectional_by(ssd_naive)
ssd_pair_naive = pair_by(ssd_naive)
