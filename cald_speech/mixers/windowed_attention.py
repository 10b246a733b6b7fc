"""Windowed attention: softmax attention of every frame to the frames around it, in linear time and memory.

What a layer map can give a layer that should keep attention of some kind. Long audio goes through in two sweeps, one
over the keys up to a frame and one over those after it, put together by the denominators of their softmaxes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cald_speech.mixers.attention_heads import AttentionHeads
from cald_speech.mixers.banded import Band, banded_attention, banded_attention_parts
from cald_speech.mixers.base import AttentionWeights, Sweep
from cald_speech.mixers.position_bias import GatedPositionBias
from cald_speech.ops import mask_padding


class KeysValues(NamedTuple):
    """The frames next to a block, (B, H, up to ``window``, d) each."""

    keys: Tensor
    values: Tensor


class WindowedAttention(AttentionHeads):
    """Attention to the frames at most ``window`` away on either side; with attention's weights, what it was, cut off.

    Arguments
    ---------
    d_model, num_heads : of the attention in whose place it stands.
    window : frames on either side; 64 are 1.28 s in speech.
    position_bias : True adds WavLM's gated relative position bias, which a start from WavLM's attention needs.
    bias : True gives the four projections a bias, as speech encoders' attention has.

    Example
    -------
    >>> mixer = WindowedAttention(64, num_heads=4, window=3)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self, d_model: int, num_heads: int = 1, *, window: int = 64, position_bias: bool = False, bias: bool = True
    ):
        super().__init__(d_model, num_heads, bias=bias)
        if window < 1:
            raise ValueError(f"window: expected at least 1 frame on either side, got {window}")
        self.window = window
        self.position_bias = GatedPositionBias(num_heads, self.head_dim, window) if position_bias else None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = mask_padding(x, lengths)  # so that nothing that stands there is multiplied, not even by zero
        q, k, v = self._heads(x)
        band = Band.over(x.size(1), x.size(1), -self.window, self.window)
        y = banded_attention(q, k, v, band, self._bias(x, band, lengths).to(q.dtype))
        return mask_padding(self.out_proj(y.transpose(1, 2).flatten(2)), lengths)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (frames.transpose(1, 2) for frames in self.project(x))
        return q, k, v

    def _bias(self, x: Tensor, band: Band, lengths: Tensor | None = None) -> Tensor:
        """What is added to the scores: -inf where a key is not seen, (B * blocks, H or 1, block, width)."""
        allowed = band.allowed(x.device, lengths)
        allowed = allowed.expand(x.size(0), *allowed.shape[-3:]).flatten(0, 1)[:, None]
        if self.position_bias is None:
            bias = torch.zeros((), dtype=x.dtype, device=x.device)
        else:
            gates = band.queries(self.position_bias.gates(x))
            bias = gates * self.position_bias.at(band.distances(x.device))
        return bias.where(allowed, -torch.inf)

    def sweeps(self) -> tuple[Sweep, ...]:
        """The keys up to each frame, and then those after it; either way a block needs ``window`` frames beside it."""
        return Sweep(self._attend_past), Sweep(self._finish_with_future, reverse=True)

    def _attend_past(self, x: Tensor, partial: None, state: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """(B, t, D) to outputs and denominators in a row, (B, t, D + 2 H)."""
        q, k, v = self._heads(x)
        first = 0
        if state is not None:
            first = state.keys.size(2)
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        band = Band.over(q.size(2), k.size(2), -self.window, 0, first)
        y, total = banded_attention_parts(q, k, v, band, self._bias(x, band))
        # In two numbers: one of half precision would move the balance between past and future by some per cent.
        coarse = total.to(x.dtype)
        parts = [part.transpose(1, 2).flatten(2).to(x.dtype) for part in (y, coarse, total - coarse)]
        last = max(0, k.size(2) - self.window)
        return torch.cat(parts, dim=2), KeysValues(k[:, :, last:], v[:, :, last:])

    def _finish_with_future(self, x: Tensor, partial: Tensor, state: KeysValues | None) -> tuple[Tensor, KeysValues]:
        q, k, v = self._heads(x)
        if state is not None:
            k, v = torch.cat([k, state.keys], dim=2), torch.cat([v, state.values], dim=2)
        band = Band.over(q.size(2), k.size(2), 1, self.window)
        future, future_total = banded_attention_parts(q, k, v, band, self._bias(x, band))
        past, coarse, fine = partial.to(future.dtype).split((x.size(2), self.num_heads, self.num_heads), dim=2)
        past = past.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        past_total = (coarse + fine).transpose(1, 2).unsqueeze(-1)
        share = torch.sigmoid(future_total - past_total)
        y = (past + share * (future - past)).to(x.dtype)
        out = self.out_proj(y.transpose(1, 2).flatten(2))
        return out, KeysValues(k[:, :, : self.window], v[:, :, : self.window])

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """q, k, v and o, with their biases, and the position bias where there is one."""
        if weights.position_bias is not None and self.position_bias is None:
            raise ValueError(
                "this attention adds a gated position bias to its scores: a start from it needs position_bias: True in "
                "the layer map's WindowedAttention. Set it, or start at random"
            )
        if weights.position_bias is None and self.position_bias is not None:
            raise ValueError(
                "position_bias: this attention has no position bias to start from. Leave it False, or start at random"
            )
        names = super().init_from_attention(weights)
        if self.position_bias is None:
            return names
        self.position_bias.copy_from(weights.position_bias)
        return names | {f"position_bias.{name}" for name, _ in self.position_bias.named_parameters()}
