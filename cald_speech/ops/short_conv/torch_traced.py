"""The short convolution for ``torch.export``: K shifted multiply-adds over all frames, for any length."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech.ops.lengths import mask_padding
from cald_speech.ops.recurrence import first


def short_conv_traced(x, weight, bias, *, lengths, reverse, initial_state, return_final_state, activation):
    """:func:`cald_speech.ops.short_conv`, which documents arguments and result."""
    num_frames, width = x.size(1), weight.size(1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    inputs = _turned(mask_padding(x, lengths).to(dtype), lengths, reverse)
    history = inputs.new_zeros(x.size(0), width - 1, x.size(2))
    if initial_state is not None:
        history = initial_state.transpose(1, 2).to(dtype)
    seen = torch.cat([history, inputs], dim=1)
    taps = weight.to(dtype).t()
    y = sum(first(seen[:, k:], num_frames) * taps[k] for k in range(width))
    y = y if bias is None else y + bias.to(dtype)
    y = F.silu(y) if activation == "silu" else y
    y = mask_padding(_turned(y, lengths, reverse), lengths).to(x.dtype)
    if not return_final_state:
        return y
    if lengths is None:
        state = seen[:, num_frames:]
    else:
        place = lengths[:, None] + torch.arange(width - 1, device=x.device)
        state = seen.gather(1, place[..., None].expand(-1, -1, x.size(2)))
    return y, state.transpose(1, 2).to(x.dtype)


def _turned(v: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """In the other order within the valid frames, if so wanted; what stands behind them is not looked at."""
    if not reverse:
        return v
    if lengths is None:
        return v.flip(1)
    place = (lengths[:, None] - 1 - torch.arange(v.size(1), device=v.device)).clamp(min=0)
    return v.gather(1, place[..., None].expand(-1, -1, v.size(2)))
