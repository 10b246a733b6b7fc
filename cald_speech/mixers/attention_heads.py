"""What mixers that are still attention share: the four projections of its heads, and their start."""

import torch
from torch import Tensor

from cald_speech.mixers.base import AttentionWeights, Mixer, Projection


class AttentionHeads(Mixer):
    """Projections to queries, keys and values of ``num_heads`` heads of size d_model / num_heads, and back.

    ``bias`` True gives all four a bias, as speech encoders' attention has.
    """

    def __init__(self, d_model: int, num_heads: int = 1, *, bias: bool = True):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"num_heads: expected a divisor of the width {d_model}, got {num_heads}")
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Projection(d_model, d_model, bias=bias) for _ in range(4)
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) to queries, keys and values, (B, T, H, d) each."""
        shape = (self.num_heads, self.head_dim)
        return (
            self.q_proj(x).unflatten(-1, shape),
            self.k_proj(x).unflatten(-1, shape),
            self.v_proj(x).unflatten(-1, shape),
        )

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """q, k, v and o, with their biases."""
        weights = weights.expanded()
        heads, head_dim, _ = weights.q.shape
        if (heads, head_dim) != (self.num_heads, self.head_dim):
            raise ValueError(
                f"a start from attention weights needs the attention's {heads} heads of size {head_dim}: got "
                f"{self.num_heads} of {self.head_dim}. Start at random"
            )
        biases = {"q": weights.q_bias, "k": weights.k_bias, "v": weights.v_bias, "out": weights.o_bias}
        if self.q_proj.bias is None and any(bias is not None for bias in biases.values()):
            raise ValueError(
                "a start from attention weights needs bias: True, for the attention's biases. Set it, or start at "
                "random"
            )
        sources = {"q": weights.q, "k": weights.k, "v": weights.v, "out": weights.o}
        for name, source in sources.items():
            layer, bias = self.get_submodule(f"{name}_proj"), biases[name]
            layer.weight.copy_(source.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.zero_() if bias is None else layer.bias.copy_(bias.flatten())
        kinds = ("weight",) if self.q_proj.bias is None else ("weight", "bias")
        return frozenset(f"{name}_proj.{kind}" for name in sources for kind in kinds)
