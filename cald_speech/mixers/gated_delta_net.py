"""Gated DeltaNet: linear attention whose state forgets and, where it is written again, corrects itself.

Yang et al., "Gated Delta Networks" (arXiv 2412.06464). For each head, with q and k of length 1,

    gate, v, k, q, b, a = W_in u + b_in                                 GatedMixer.project
    v, k, q             = act(conv(.)), where there is a convolution    SSDScan.convolved
    beta                = sigmoid(b)                                    DeltaScan.arguments
    g                   = -exp(A_log) softplus(a + dt_bias)
    S_t                 = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
    y_t                 = S_t q_t                                       cald_speech.ops.gated_delta
    out                 = W_out (norm(y) * silu(gate)) + b_out          GatedMixer.finish

``per_channel`` gives every channel of the keys its own decay, as Kimi Delta Attention has (arXiv 2510.26692): a then is
a projection of low rank. Its gate, which theirs makes by another such projection and a sigmoid, stays as above.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.mixers.base import AttentionWeights
from cald_speech.mixers.gated_linear_attention import HeadNorm
from cald_speech.mixers.mamba2 import GatedMixer, Heads, SSDScan
from cald_speech.mixers.scan import CausalMixer, Scan, step_size_bias
from cald_speech.ops import gated_delta

# How strongly a start from attention writes. With little the delta rule is linear attention but for what the state
# answers already; attention has no such correction.
START_STRENGTH = 0.1


class DeltaScan(SSDScan):
    """What of gated DeltaNet looks across time: the delta rule and, where there is one, a convolution over v, k, q.

    Its streams are v, k, q joined, (B, T, channels), and the write strengths before the sigmoid joined with the decays
    before softplus: (B, T, 2 H) or, with a decay for each channel, (B, T, H + decay_rank).

    Arguments
    ---------
    heads : the geometry.
    d_conv, activation : as in :class:`~cald_speech.mixers.mamba2.SSDScan`, but that the activation is there without a
        convolution too.
    per_channel : True gives every channel of the keys its decay.
    decay_rank : of the projection that makes these; None takes the size of a head.
    negative_eigenvalues : True lets write strengths go to 2, where a key's value is not replaced but turned round
        (arXiv 2411.12537).
    options : ``dt_range``, ``A_range``, ``chunk_size`` and ``backend`` of SSDScan.
    """

    op = staticmethod(gated_delta)

    def __init__(
        self,
        heads: Heads,
        *,
        d_conv: int = 0,
        activation: str = "identity",
        per_channel: bool = False,
        decay_rank: int | None = None,
        negative_eigenvalues: bool = False,
        dt_range: tuple[float, float] = (0.001, 0.1),
        **options,
    ):
        super().__init__(heads, d_conv=d_conv, activation=activation, dt_range=dt_range, skip=False, **options)
        self.activation, self.most_strength = activation, 2.0 if negative_eigenvalues else 1.0
        self.decay_proj = None
        if per_channel:
            channels = heads.count * heads.d_state
            self.dt_bias = nn.Parameter(step_size_bias(channels, dt_range))
            self.decay_proj = nn.Linear(decay_rank or heads.head_dim, channels, bias=False)

    # SSDScan's own run the SSD over both directions at once.
    with_reverse = Scan.with_reverse
    beside = Scan.beside

    def arguments(self, streams: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """q, k, v, beta and g, as :func:`cald_speech.ops.gated_delta` takes them, from convolved streams."""
        vkq, per_head = streams
        if self.conv1d is None and self.activation == "silu":
            vkq = F.silu(vkq)
        v, k, q = self.split(vkq)
        strength, decay = per_head.split((self.heads.count, per_head.size(-1) - self.heads.count), dim=-1)
        beta = strength.float().sigmoid() * self.most_strength
        if self.decay_proj is not None:
            decay = self.decay_proj(decay)
        g = self.step_sizes(decay)  # in float32, as the decay rates
        rates = self.decay_rates()
        if self.decay_proj is not None:
            g, rates = g.unflatten(-1, (self.heads.count, self.heads.d_state)), rates[:, None]
        return unit_length(q), unit_length(k), v, beta, g * rates


def unit_length(v: Tensor) -> Tensor:
    """Every last axis at length 1, or at less where it is next to nothing; in float32 within.

    Example
    -------
    >>> unit_length(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    size = v.size(-1)
    return (F.rms_norm(v.float(), (size,), eps=1e-6 / size) * size**-0.5).to(v.dtype)


class GatedDeltaNet(GatedMixer, CausalMixer):
    """The gated delta rule, a norm for each head, then the gate.

    Arguments
    ---------
    d_model : width D of the layer.
    num_heads : heads of the attention in whose place it stands.
    options : ``head_dim``, ``d_state`` (the size of a key), ``n_groups``, ``expand`` and ``bias`` of
        :class:`~cald_speech.mixers.mamba2.GatedMixer`; ``d_conv``, ``activation``, ``per_channel``, ``decay_rank``,
        ``negative_eigenvalues``, ``dt_range``, ``A_range``, ``chunk_size`` and ``backend`` of :class:`DeltaScan`. The
        paper's are ``d_conv: 4`` and ``activation: silu``.

    Example
    -------
    >>> mixer = GatedDeltaNet(64, num_heads=4, per_channel=True)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    norm_first = True

    @property
    def values_beside(self) -> int:
        """A write strength for each head, and a decay, or what the heads' decays for each channel are made of."""
        per_channel = self.scan_options.get("per_channel", False)
        decays = self.scan_options.get("decay_rank") or self.heads.head_dim if per_channel else self.heads.count
        return self.heads.count + decays

    def new_scan(self) -> DeltaScan:
        return DeltaScan(self.heads, **self.scan_options)

    def new_norm(self) -> HeadNorm:
        return HeadNorm(self.heads.count, self.heads.head_dim)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """q, k, v and o as they are, an open gate, and write strengths with which hardly anything is corrected."""
        named = super().init_from_attention(weights)
        strengths = self.in_proj.bias[-self.values_beside :][: self.heads.count]
        share = START_STRENGTH / self.scan.most_strength
        strengths.fill_(math.log(share / (1 - share)))
        return named
