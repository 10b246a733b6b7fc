"""The gated delta rule, frame by frame: the definition that every fast path is tested against.

Each head h keeps a state S in R^{P x N}, which answers a key k with the value S k. At every frame t (Yang et al.,
"Gated Delta Networks", arXiv 2412.06464; with a decay for each channel of the keys "Kimi Linear", arXiv 2510.26692) it
decays, and is then corrected at k_t towards v_t, as far as beta_t says:

    S_t = S_{t-1} Diag(exp g_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
        = S' + beta_t (v_t - S' k_t) k_t^T     with S' = S_{t-1} Diag(exp g_t)
    y_t = S_t q_t

That is a step of gradient descent, of size beta_t, on the error |S' k_t - v_t|^2 / 2. With g <= 0 the decay lies in
(0, 1]. Heads share q and k in groups: head h reads group h // (H / G). ``reverse`` runs the same recurrence from the
last valid frame to the first.
"""

import torch
from torch import Tensor

from cald_speech.ops.lengths import mask_padding


def gated_delta_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step for each frame. Same signature as :func:`cald_speech.ops.gated_delta`, which documents it.

    ``chunk_size`` is accepted for that reason and changes nothing. Example: see there.
    """
    batch, num_frames, heads, head_dim = v.shape
    groups, d_state = k.shape[2:]
    # 1. Arithmetic in float32 (or float64, for gradient checks): decays near 1 are lost in half precision.
    dtype = torch.promote_types(v.dtype, torch.float32)
    # Padding is overwritten before it is computed with: torch.where alone would let a NaN there into the gradients.
    q, k, values, beta, g = (mask_padding(tensor, lengths).to(dtype) for tensor in (q, k, v, beta, g))
    q, k = (tensor.repeat_interleave(heads // groups, dim=2) for tensor in (q, k))
    g = g if g.dim() == 4 else g[..., None]
    state = values.new_zeros(batch, heads, head_dim, d_state) if initial_state is None else initial_state.to(dtype)
    if lengths is None:
        lengths = torch.full((batch,), num_frames, device=v.device)
    # 2. The recurrence. A frame past the end of its sequence leaves the state alone and puts out zero.
    outputs = [None] * num_frames
    for t in reversed(range(num_frames)) if reverse else range(num_frames):
        decayed = state * torch.exp(g[:, t])[:, :, None]
        error = values[:, t] - torch.einsum("bhpn,bhn->bhp", decayed, k[:, t])
        update = (beta[:, t, :, None] * error)[..., None] * k[:, t, :, None]
        valid = (t < lengths)[:, None, None, None]
        state = torch.where(valid, decayed + update, state)
        outputs[t] = torch.where(valid[..., 0], torch.einsum("bhpn,bhn->bhp", state, q[:, t]), 0.0)
    # 3. Back to the values' dtype; the state stays in float32, since it is carried on.
    y = torch.stack(outputs, dim=1).to(v.dtype) if num_frames else v.clone()
    return (y, state) if return_final_state else y
