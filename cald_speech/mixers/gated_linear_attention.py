"""Gated linear attention: q, k and v from attention, a decaying state in the softmax's place, an output gate.

Yang et al., "Gated Linear Attention Transformers" (arXiv 2312.06635). Their decay is a vector, one factor for each
entry of a key; here it is one scalar for each head and frame, as in flash-linear-attention's ``simple_gla``, so that
the scan is SSD. The step size also weighs what enters the state, as in Mamba-2, which theirs does not.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.mixers.mamba2 import GatedMixer
from cald_speech.mixers.scan import CausalMixer


class HeadNorm(nn.Module):
    """An RMS norm over each head alone, with a weight for every channel.

    Example
    -------
    >>> norm = HeadNorm(num_heads=2, head_dim=4)
    >>> norm(torch.tensor([1.0] * 4 + [300.0] * 4)).round(decimals=3).unique().item()
    1.0
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float = 1e-5):
        super().__init__()
        self.shape, self.eps = (num_heads, head_dim), eps
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))

    def forward(self, y: Tensor) -> Tensor:
        """(..., H * P) to the same."""
        return F.rms_norm(y.unflatten(-1, self.shape), self.shape[1:], eps=self.eps).flatten(-2) * self.weight


class GatedLinearAttention(GatedMixer, CausalMixer):
    """A norm for each head and then the gate, and neither a convolution nor a direct path.

    Arguments
    ---------
    d_model : width D of the layer.
    num_heads : heads of the attention in whose place it stands.
    options : ``head_dim``, ``d_state`` (the size of a key), ``n_groups``, ``expand`` and ``bias`` of
        :class:`~cald_speech.mixers.mamba2.GatedMixer`; ``dt_range``, ``A_range``, ``chunk_size`` and ``backend`` of
        :class:`~cald_speech.mixers.mamba2.SSDScan`.

    Example
    -------
    >>> mixer = GatedLinearAttention(64, num_heads=4)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    norm_first = True

    def __init__(self, d_model: int, num_heads: int = 1, **options):
        super().__init__(d_model, num_heads, d_conv=0, activation="identity", skip=False, **options)

    def new_norm(self) -> HeadNorm:
        return HeadNorm(self.heads.count, self.heads.head_dim)
