"""Mamba-2: input projection, short convolution, state-space scan, gated RMS norm, output projection.

Dao & Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7. Started from attention weights, C, B and x take the
places of q, k and v ("The Mamba in the Llama", arXiv 2408.15237): the scan is then linear attention with a decay.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.mixers.base import AttentionWeights, CausalMixer, Scan, Streams
from cald_speech.mixers.projection import Projection
from cald_speech.ops import short_conv, ssd, ssd_bidirectional

# silu(GATE_OPEN) = 1: a gate of this bias and zero weights lets everything through.
GATE_OPEN = 1.27846


class Mamba2State(NamedTuple):
    """What one piece of a sequence leaves for the next: the convolution's last inputs and the scan's state."""

    conv: Tensor | None  # (B, channels, d_conv - 1)
    ssd: Tensor  # (B, H, P, N), float32


class Mamba2Scan(Scan):
    """Everything of Mamba-2 that looks across time: the short convolution over x, B, C, and the SSD scan."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        d_state: int,
        n_groups: int,
        *,
        d_conv: int,
        activation: str,
        dt_range: tuple[float, float],
        A_range: tuple[float, float],
        chunk_size: int | None,
        backend: str,
    ):
        super().__init__()
        self.shape = (num_heads, head_dim, n_groups, d_state)
        self.activation, self.chunk_size, self.backend = activation, chunk_size, backend
        self.sizes = (num_heads * head_dim, n_groups * d_state, n_groups * d_state)
        channels = sum(self.sizes)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels) if d_conv else None
        # dt = softplus(dt_bias + ...) starts log-uniform in dt_range: heads that remember from one to 1,000 frames.
        dt = torch.exp(torch.empty(num_heads).uniform_(math.log(dt_range[0]), math.log(dt_range[1])))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(*A_range).log())
        self.D = nn.Parameter(torch.ones(num_heads))

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) and .half() reach every parameter through here, and its gradient with it. The scan's own
        # (SCAN_PARAMETERS) stay in float32 and only change device.
        def in_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device, torch.float32)

        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(in_float32, recurse=False)

    @torch.no_grad()
    def pass_through(self) -> None:
        """Let the convolution hand on the present frame, so that the scan sees what the projections put out."""
        if self.conv1d is not None:
            self.conv1d.weight.zero_()
            self.conv1d.weight[..., -1] = 1.0
            self.conv1d.bias.zero_()

    def forward(
        self, streams: tuple[Tensor, Tensor], lengths: Tensor | None, *, state: Mamba2State | None, reverse: bool
    ) -> tuple[Tensor, Mamba2State]:
        """x, B, C joined (B, T, channels) and dt (B, T, H), before convolution and softplus, to y (B, T, H * P)."""
        xBC, dt = streams
        conv_state, ssd_state = (None, None) if state is None else state
        if self.conv1d is not None:
            xBC, conv_state = short_conv(
                xBC,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                lengths=lengths,
                reverse=reverse,
                initial_state=conv_state,
                return_final_state=True,
                activation=self.activation,
            )
        x, B, C = self._split(xBC)
        y, ssd_state = ssd(
            x,
            self.step_sizes(dt),
            self.decay_rates(),
            B,
            C,
            self.D,
            lengths=lengths,
            reverse=reverse,
            initial_state=ssd_state,
            return_final_state=True,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        return y.flatten(-2), Mamba2State(conv_state, ssd_state)

    def with_reverse(self, other: "Mamba2Scan", streams: tuple[Tensor, Tensor], lengths: Tensor | None) -> Tensor:
        """As :class:`Scan` says; without convolutions both directions see the same x, B and C, which are read once."""
        if self.conv1d is not None:
            return super().with_reverse(other, streams, lengths)
        xBC, dt = streams
        x, B, C = self._split(xBC)
        y = ssd_bidirectional(
            x,
            torch.stack([self.step_sizes(dt), other.step_sizes(dt)], dim=2),
            torch.stack([self.decay_rates(), other.decay_rates()]),
            B,
            C,
            self.D + other.D,
            lengths=lengths,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        return y.flatten(-2)

    def step_sizes(self, dt: Tensor) -> Tensor:
        """The projection (B, T, H) to dt > 0, in float32."""
        return F.softplus(dt.float() + self.dt_bias.float())

    def decay_rates(self) -> Tensor:
        """A < 0, (H,), in float32."""
        return -self.A_log.float().exp()

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, head_dim, groups, d_state = self.shape
        x, B, C = xBC.split(self.sizes, dim=-1)
        return (
            x.unflatten(-1, (heads, head_dim)),
            B.unflatten(-1, (groups, d_state)),
            C.unflatten(-1, (groups, d_state)),
        )


class Mamba2(CausalMixer):
    """The Mamba-2 mixer.

    Arguments
    ---------
    d_model : width D of the layer.
    num_heads : heads of the attention in whose place it stands; sets ``head_dim``, ``n_groups`` where those are None.
    head_dim : size P of a head; None takes the attention's own, d_model / num_heads.
    d_state : size N of the state of each channel; None takes head_dim, which a start from attention weights needs.
    n_groups : how many B and C there are; None takes one for each head, as attention has.
    expand : inner width over d_model; head_dim must divide the inner width.
    d_conv : taps of the short convolution; 0 for none (and no activation), which makes it gated linear attention.
    bias : True gives both projections a bias, as speech encoders' attention has.
    activation : ``silu`` or ``identity``, after the convolution.
    dt_range, A_range : where step sizes and decay rates start; a head's memory is 1 / (dt A) frames.
    chunk_size, backend : handed to :func:`cald_speech.ops.ssd`.

    Example
    -------
    >>> mixer = Mamba2(64, num_heads=4)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 1,
        *,
        head_dim: int | None = None,
        d_state: int | None = None,
        n_groups: int | None = None,
        expand: int = 1,
        d_conv: int = 4,
        bias: bool = True,
        activation: str = "silu",
        dt_range: tuple[float, float] = (0.001, 0.1),
        A_range: tuple[float, float] = (1.0, 16.0),
        chunk_size: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        head_dim = head_dim or d_model // num_heads
        d_state = d_state or head_dim
        d_inner = expand * d_model
        if d_inner % head_dim:
            raise ValueError(f"head_dim: expected a divisor of the inner width {d_inner}, got {head_dim}")
        heads = d_inner // head_dim
        groups = n_groups or heads
        if heads % groups:
            raise ValueError(f"n_groups: expected a divisor of the {heads} heads, got {groups}")
        self.scan_options = {"d_conv": d_conv, "activation": activation, "dt_range": dt_range, "A_range": A_range}
        self.scan_options |= {"chunk_size": chunk_size, "backend": backend}
        self.shape = (heads, head_dim, d_state, groups)
        self.sizes = (d_inner, d_inner + 2 * groups * d_state, heads)
        self.in_proj = Projection(d_model, sum(self.sizes), bias=bias)
        self.scan = self.new_scan()
        self.norm = nn.RMSNorm(d_inner, eps=1e-5)
        self.out_proj = Projection(d_inner, d_model, bias=bias)

    def new_scan(self) -> Mamba2Scan:
        heads, head_dim, d_state, groups = self.shape
        return Mamba2Scan(heads, head_dim, d_state, groups, **self.scan_options)

    def project(self, x: Tensor) -> Streams:
        gate, xBC, dt = self.in_proj(x).split(self.sizes, dim=-1)
        return Streams((xBC, dt), gate)

    def finish(self, y: Tensor, gate: Tensor) -> Tensor:
        # The norm's own dtype: under autocast that is float32, and the projection casts down again.
        return self.out_proj(self.norm((y * F.silu(gate)).to(self.norm.weight.dtype)))

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """q to C, k to B, v to x, o to the output projection; the gate starts open."""
        weights = weights.expanded()
        heads, head_dim, d_state, groups = self.shape
        attention_heads, attention_dim, d_model = weights.q.shape
        if (heads, head_dim, d_state, groups) != (attention_heads, attention_dim, attention_dim, attention_heads):
            raise ValueError(
                f"a start from attention weights needs one group and one state column for each of the attention's "
                f"{attention_heads} heads of size {attention_dim}: got {heads} heads of {head_dim}, d_state {d_state}, "
                f"n_groups {groups}. Leave head_dim, d_state, n_groups and expand at their defaults, or start at random"
            )
        if self.in_proj.bias is None:
            raise ValueError(
                "a start from attention weights needs bias: True, for the attention's biases and an open gate. Set it, "
                "or start at random"
            )
        gate, x, B, C, dt = self.in_proj.weight.split((self.sizes[0], *self.scan.sizes, heads))
        for rows, source in ((x, weights.v), (B, weights.k), (C, weights.q * attention_dim**-0.5)):
            rows.copy_(source.reshape(-1, d_model))
        self.out_proj.weight.copy_(weights.o.reshape(d_model, -1))
        # An open gate: a random one would turn the sign of half of the copied values.
        gate.mul_(0.1)
        gate, x, B, C, dt = self.in_proj.bias.split((self.sizes[0], *self.scan.sizes, heads))
        gate.fill_(GATE_OPEN)
        dt.zero_()
        scale = attention_dim**-0.5
        for rows, source, factor in ((x, weights.v_bias, 1.0), (B, weights.k_bias, 1.0), (C, weights.q_bias, scale)):
            rows.zero_() if source is None else rows.copy_(source.reshape(-1) * factor)
        self.out_proj.bias.zero_() if weights.o_bias is None else self.out_proj.bias.copy_(weights.o_bias)
        # The norm brings every channel to size 1, where attention puts out averages of values. Values of a normed input
        # have the size of their row of W_v; that averaging takes half of it is a guess, not tuned.
        self.norm.weight.copy_(0.5 * weights.v.reshape(-1, d_model).norm(dim=-1))
        self.scan.pass_through()
        return frozenset({"in_proj.weight", "out_proj.weight", "in_proj.bias", "out_proj.bias"})
