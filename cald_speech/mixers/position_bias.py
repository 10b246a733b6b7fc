"""The gated relative position bias of WavLM's attention (arXiv 2110.13900, section 3.1), for a window's distances."""

import torch
from torch import Tensor, nn

from cald_speech.mixers.base import PositionBias


class GatedPositionBias(nn.Module):
    """A bias for each head and each distance up to ``window``, which every query scales by a gate of its own frame.

    Example
    -------
    >>> bias = GatedPositionBias(num_heads=2, head_dim=4, window=3)
    >>> x = torch.randn(1, 5, 8)
    >>> bias.gates(x).shape, bias.at(torch.arange(-3, 4)).shape
    (torch.Size([1, 2, 5, 1]), torch.Size([2, 7]))
    """

    def __init__(self, num_heads: int, head_dim: int, window: int):
        super().__init__()
        self.window, self.shape = window, (num_heads, head_dim)
        self.by_distance = nn.Parameter(0.02 * torch.randn(num_heads, 2 * window + 1))
        self.gate = nn.Linear(head_dim, 2)
        self.scale = nn.Parameter(torch.ones(num_heads))

    def gates(self, x: Tensor) -> Tensor:
        """(B, T, D), the mixer's input, to (B, H, T, 1)."""
        a, b = torch.sigmoid(self.gate(x.unflatten(-1, self.shape))).chunk(2, dim=-1)
        return (a * (b * self.scale[:, None] - 1.0) + 2.0).transpose(1, 2)

    def at(self, distances: Tensor) -> Tensor:
        """Distances from query to key, of any shape, to their biases (H, *shape); beyond the window, its end's."""
        return self.by_distance[:, distances.clamp(-self.window, self.window) + self.window]

    @torch.no_grad()
    def copy_from(self, source: PositionBias) -> None:
        """Take over an attention's."""
        reach = source.by_distance.size(1) // 2
        distances = torch.arange(-self.window, self.window + 1, device=source.by_distance.device)
        self.by_distance.copy_(source.by_distance[:, distances.clamp(-reach, reach) + reach])
        self.gate.weight.copy_(source.gate)
        self.gate.bias.copy_(source.gate_bias)
        self.scale.copy_(source.scale)
