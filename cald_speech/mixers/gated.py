"""What Mamba-2, gated linear attention and Hydra share: one projection to heads and a gate, a scan, norm and output."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.mixers.base import AttentionWeights, Mixer
from cald_speech.mixers.causal import Streams
from cald_speech.mixers.projection import Projection
from cald_speech.mixers.ssd_scan import Heads, SSDScan

# silu(GATE_OPEN) = 1: a gate of this bias and zero weights lets everything through.
GATE_OPEN = 1.27846


class GatedMixer(Mixer):
    """A projection to gate, x, B, C and some values for each head; what a scan makes of them, normed and gated.

    Subclasses say how the frames are looked over; ``scan_class`` is what :meth:`new_scan` builds, and
    ``values_per_head`` counts what the projection gives each head beside x: its step size, at least. ``norm_first``
    says whether the norm comes before the gate or behind it.

    Arguments
    ---------
    d_model : width D of the layer.
    num_heads : heads of the attention in whose place it stands; sets ``head_dim``, ``n_groups`` where those are None.
    head_dim : size P of a head; None takes the attention's own, d_model / num_heads.
    d_state : size N of the state of each channel; None takes head_dim, which a start from attention weights needs.
    n_groups : how many B and C there are; None takes one for each head, as attention has.
    expand : inner width over d_model; head_dim must divide the inner width.
    bias : True gives both projections a bias, as speech encoders' attention has.
    scan_options : handed to the scan.
    """

    scan_class: ClassVar[type[SSDScan]] = SSDScan
    values_per_head: ClassVar[int] = 1
    norm_first: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        num_heads: int = 1,
        *,
        head_dim: int | None = None,
        d_state: int | None = None,
        n_groups: int | None = None,
        expand: int = 1,
        bias: bool = True,
        **scan_options,
    ):
        super().__init__()
        head_dim = head_dim or d_model // num_heads
        d_inner = expand * d_model
        if d_inner % head_dim:
            raise ValueError(f"head_dim: expected a divisor of the inner width {d_inner}, got {head_dim}")
        count = d_inner // head_dim
        groups = n_groups or count
        if count % groups:
            raise ValueError(f"n_groups: expected a divisor of the {count} heads, got {groups}")
        self.heads = Heads(count, head_dim, d_state or head_dim, groups)
        self.scan_options = scan_options
        self.sizes = (d_inner, sum(self.heads.sizes), self.values_per_head * count)
        self.in_proj = Projection(d_model, sum(self.sizes), bias=bias)
        self.scan = self.new_scan()
        self.norm = self.new_norm()
        self.out_proj = Projection(d_inner, d_model, bias=bias)

    def new_scan(self) -> SSDScan:
        """Another, freshly initialised scan over the same streams."""
        return self.scan_class(self.heads, **self.scan_options)

    def new_norm(self) -> nn.Module:
        """A norm with a ``weight`` for each channel of the inner width."""
        return nn.RMSNorm(self.sizes[0], eps=1e-5)

    def project(self, x: Tensor) -> Streams:
        """(B, T, D) to x, B, C joined and the heads' own values, for the scan, and the gate."""
        gate, xBC, per_head = self.in_proj(x).split(self.sizes, dim=-1)
        return Streams((xBC, per_head), gate)

    def finish(self, y: Tensor, gate: Tensor) -> Tensor:
        """The scan's output (B, T, H * P) and the gate to (B, T, D)."""
        # The norm's own dtype: under autocast that is float32, and the projection casts down again.
        gate, dtype = F.silu(gate), self.norm.weight.dtype
        return self.out_proj(self.norm(y.to(dtype)) * gate if self.norm_first else self.norm((y * gate).to(dtype)))

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """q to C, k to B, v to x, o to the output projection; the gate starts open."""
        weights = weights.expanded()
        self._check_fits(weights)
        head_dim, d_model = weights.q.shape[1:]
        scale = head_dim**-0.5
        sizes = (self.sizes[0], *self.heads.sizes, self.sizes[2])
        gate, x, B, C, _ = self.in_proj.weight.split(sizes)
        for rows, source in ((x, weights.v), (B, weights.k), (C, weights.q * scale)):
            rows.copy_(source.reshape(-1, d_model))
        self.out_proj.weight.copy_(weights.o.reshape(d_model, -1))
        # An open gate: a random one would turn the sign of half of the copied values.
        gate.mul_(0.1)
        gate, x, B, C, per_head = self.in_proj.bias.split(sizes)
        gate.fill_(GATE_OPEN)
        per_head.zero_()
        for rows, source, factor in ((x, weights.v_bias, 1.0), (B, weights.k_bias, 1.0), (C, weights.q_bias, scale)):
            rows.zero_() if source is None else rows.copy_(source.reshape(-1) * factor)
        self.out_proj.bias.zero_() if weights.o_bias is None else self.out_proj.bias.copy_(weights.o_bias)
        # The norm brings every channel to size 1, where attention puts out averages of values. Values of a normed input
        # have the size of their row of W_v; that averaging takes half of it is a guess, not tuned.
        self.norm.weight.copy_(0.5 * weights.v.reshape(-1, d_model).norm(dim=-1))
        self.scan.pass_through()
        return frozenset({"in_proj.weight", "out_proj.weight", "in_proj.bias", "out_proj.bias"})

    def _check_fits(self, weights: AttentionWeights) -> None:
        heads, dim, _ = weights.q.shape
        if self.heads != Heads(heads, dim, dim, heads):
            count, head_dim, d_state, groups = self.heads
            raise ValueError(
                f"a start from attention weights needs one group and one state column for each of the attention's "
                f"{heads} heads of size {dim}: got {count} heads of {head_dim}, d_state {d_state}, "
                f"n_groups {groups}. Leave head_dim, d_state, n_groups and expand at their defaults, or start at random"
            )
        if self.in_proj.bias is None:
            raise ValueError(
                "a start from attention weights needs bias: True, for the attention's biases and an open gate. Set it, "
                "or start at random"
            )
