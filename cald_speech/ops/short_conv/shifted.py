"""Causal depthwise convolution as K shifted multiply-adds in (B, T, D) layout: no transpose, no im2col."""

import torch
from torch import Tensor

from cald_speech.ops.lengths import mask_padding
from cald_speech.ops.short_conv.naive import ACTIVATIONS


def short_conv_shifted(
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
    """Same signature and result as :func:`cald_speech.ops.short_conv`, which documents it."""
    num_frames, past = x.size(1), weight.size(1) - 1
    x = mask_padding(x, lengths)
    padded = _with_history(x, past, lengths, reverse, initial_state)
    taps = weight.to(x.dtype).flip(1).unbind(1) if reverse else weight.to(x.dtype).unbind(1)
    y = padded[:, :num_frames] * taps[0]
    for k in range(1, past + 1):
        y = torch.addcmul(y, padded[:, k : k + num_frames], taps[k])
    if bias is not None:
        y = y + bias.to(x.dtype)
    y = mask_padding(ACTIVATIONS[activation](y), lengths)
    return (y, _final_state(padded, past, lengths, reverse)) if return_final_state else y


def _with_history(x: Tensor, past: int, lengths: Tensor | None, reverse: bool, state: Tensor | None) -> Tensor:
    """``x`` (B, T, D) with the ``past`` frames that the scan saw before: in front, or behind the last valid frame."""
    history = x.new_zeros(x.size(0), past, x.size(2)) if state is None else state.to(x.dtype).transpose(1, 2)
    if not reverse:
        return torch.cat([history, x], dim=1)
    padded = torch.cat([x, history.flip(1)], dim=1)
    if lengths is None or state is None:
        return padded if state is not None else torch.cat([x, history], dim=1)
    # The padding is zero, so the history may be moved to stand right behind each sequence's last valid frame.
    frames = lengths[:, None] + torch.arange(past, device=x.device)
    index = frames[..., None].expand(-1, -1, x.size(2))
    empty = torch.cat([x, torch.zeros_like(history)], dim=1)
    return empty.scatter(1, index, history.flip(1))


def _final_state(padded: Tensor, past: int, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The last ``past`` inputs in the order of the scan, (B, D, past)."""
    if reverse:
        return padded[:, :past].flip(1).transpose(1, 2)
    if lengths is None:
        return padded[:, padded.size(1) - past :].transpose(1, 2)
    frames = lengths[:, None] + torch.arange(past, device=padded.device)
    return padded.gather(1, frames[..., None].expand(-1, -1, padded.size(2))).transpose(1, 2)
