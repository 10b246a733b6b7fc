"""Linformer: softmax attention to a fixed number of mixtures of the frames, in the place of the frames themselves.

Wang et al., "Linformer: Self-Attention with Linear Complexity" (arXiv 2006.04768). Keys and values (T, d) of each head
become E K and F V, (k, d), with learned E and F (k, max_length) that all heads of a layer share; CALD converts RoBERTa
to it with k = 256, E and F drawn from N(0, 1), and their products scaled by 1 / sqrt(T).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.errors import UserError
from cald_speech.mixers.attention_heads import AttentionHeads
from cald_speech.ops import mask_padding

SHARING = ("none", "kv", "layer")


class TooLong(UserError, ValueError):
    """An input of more frames than a mixer has weights for."""


class Linformer(AttentionHeads):
    """Attention to ``k`` learned mixtures of up to ``max_length`` frames; not causal, and for bounded lengths.

    Arguments
    ---------
    d_model, num_heads : of the attention in whose place it stands.
    k : mixtures that every frame attends to.
    max_length : the most frames of an input; one that is longer has no weights, and is refused.
    sharing : ``none``, keys and values are mixed by weights of their own; ``kv``, by the same; ``layer``, by the same
        in all layers whose entries in the layer map are equal.
    fill_padding : True gives padded frames an output too: what their own queries read from the valid frames' mixtures.
        Valid frames are the same. CALD's code fills them, and its loss for text compares them.
    bias : True gives the four projections a bias, as speech encoders' attention has.

    Raises
    ------
    TooLong
        from ``forward`` for an input of more than ``max_length`` frames, padding included. It is a ValueError, and a
        UserError too, since audio can be cut shorter.

    Example
    -------
    >>> mixer = Linformer(64, num_heads=4, k=8, max_length=100)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 1,
        *,
        k: int = 256,
        max_length: int = 1536,
        sharing: str = "none",
        fill_padding: bool = False,
        bias: bool = True,
    ):
        super().__init__(d_model, num_heads, bias=bias)
        if sharing not in SHARING:
            raise ValueError(f"sharing: expected one of {', '.join(SHARING)}, got {sharing!r}")
        if min(k, max_length) < 1:
            raise ValueError(f"k, max_length: expected at least 1 each, got {k} and {max_length}")
        self.max_length, self.sharing, self.fill_padding = max_length, sharing, fill_padding
        new = lambda: nn.Parameter(torch.randn(k, max_length))  # noqa: E731
        self.mix_keys = new()
        self.mix_values = new() if sharing == "none" else None

    def share_with(self, first: "Linformer") -> None:
        """One E for all layers, with ``sharing: layer``."""
        if self.sharing == "layer":
            self.mix_keys = first.mix_keys

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        num_frames = x.size(1)
        if num_frames > self.max_length:
            raise TooLong(
                f"max_length: this Linformer has weights for up to {self.max_length} frames, and got {num_frames}. "
                "Give shorter inputs, or convert with a larger max_length"
            )
        q, k, v = self.project(x)
        # CALD's scale: whatever its length, an input's mixtures are as large as its frames at the start.
        own = torch.full_like(x[:, 0, 0], num_frames) if lengths is None else lengths.clamp(min=1).to(x.dtype)
        scale = own.rsqrt()[:, None, None, None]
        # A padded frame has a key and a value too, if only by their biases: it must not be mixed in.
        mixed = [
            scale * torch.einsum("st,bthd->bhsd", weights[:, :num_frames], mask_padding(frames, lengths))
            for weights, frames in ((self.mix_keys, k), (self._mix_values(), v))
        ]
        y = F.scaled_dot_product_attention(q.transpose(1, 2), *mixed)
        out = self.out_proj(y.transpose(1, 2).flatten(2))
        return out if self.fill_padding else mask_padding(out, lengths)

    def _mix_values(self) -> Tensor:
        return self.mix_keys if self.mix_values is None else self.mix_values
