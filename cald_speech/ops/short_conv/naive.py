"""Causal depthwise convolution, frame by frame: the definition.

With kernel width K and weights w (D, K), in the order of the scan,

    y_t = act( bias + sum_{k=0}^{K-1} w_k x_{t-(K-1)+k} )

so w_{K-1} weighs the present frame. What stands before the first frame comes from ``initial_state`` (zeros if None).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def short_conv_naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str = "silu",
) -> Tensor | tuple[Tensor, Tensor]:
    """One window for each frame. Same signature as :func:`cald_speech.ops.short_conv`, which documents it."""
    batch, num_frames, channels = x.shape
    width = weight.size(1)
    # Sums of half-precision inputs are kept in float32; so are those of a parameter's gradient over the frames.
    inputs = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = (None if v is None else v.to(inputs.dtype) for v in (weight, bias))
    window = inputs.new_zeros(batch, channels, width - 1) if initial_state is None else initial_state.to(inputs.dtype)
    if lengths is None:
        lengths = torch.full((batch,), num_frames, device=x.device)
    outputs = [None] * num_frames
    for t in reversed(range(num_frames)) if reverse else range(num_frames):
        valid = (t < lengths)[:, None]
        seen = torch.cat([window, torch.where(valid, inputs[:, t], 0.0)[..., None]], dim=-1)
        y = (seen * weight).sum(-1)
        if bias is not None:
            y = y + bias
        outputs[t] = torch.where(valid, F.silu(y) if activation == "silu" else y, 0.0)
        window = torch.where(valid[..., None], seen[..., 1:], window)
    y = torch.stack(outputs, dim=1).to(x.dtype) if num_frames else x.clone()
    return (y, window.to(x.dtype)) if return_final_state else y
