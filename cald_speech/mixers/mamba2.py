"""Mamba-2: input projection, short convolution, state-space scan, gated RMS norm, output projection.

Dao & Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7. For the layer's input u, frame by frame and for each
head, with the step sizes dt > 0 and the decay rates A < 0:

    z, xBC, dt = W_in u + b_in                                   GatedMixer.project
    x, B, C    = silu(conv(xBC))                                 SSDScan.convolved
    dt         = softplus(dt + dt_bias),   A = -exp(A_log)       SSDScan.arguments
    S_t        = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T            cald_speech.ops.ssd, whose
    y_t        = S_t C_t + D x_t                                 definition is ops/ssd/naive.py
    out        = W_out norm(y * silu(z)) + b_out                 GatedMixer.finish

Started from attention weights, C, B and x take the places of q, k and v ("The Mamba in the Llama", arXiv 2408.15237):
the scan is then linear attention with a decay, to which :func:`constant_product` adds what softmax has and linear
attention lacks. Gated linear attention and Hydra are the same parts put together in
another way. What a scan, its state and its pieces are is in ``scan.py``.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.mixers.base import AttentionWeights, Mixer, Projection
from cald_speech.mixers.scan import (
    GATE_OPEN,
    START_RATES,
    STEP_OF_ONE,
    CausalMixer,
    Scan,
    ShortConvolution,
    Streams,
    step_size_bias,
)
from cald_speech.ops import ssd, ssd_bidirectional, ssd_pair

STEPS, RATES = (0.001, 0.1), (1.0, 16.0)  # the paper's
NEARLY_LINEAR = 0.3  # of the values that a SiLU is given: it then puts out half of them and little else


class Heads(NamedTuple):
    """How many heads there are, of what size, how wide the state of each channel is, and how many B and C there are."""

    count: int
    head_dim: int
    d_state: int
    groups: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Widths of x, B and C."""
        return self.count * self.head_dim, self.groups * self.d_state, self.groups * self.d_state


class GatedMixer(Mixer):
    """A projection to gate, x, B, C and some values for each head; what a scan makes of them, normed and gated.

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
    scan_options : handed to :class:`SSDScan`.
    """

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
        self.sizes = (d_inner, sum(self.heads.sizes), self.values_beside)
        self.in_proj = Projection(d_model, sum(self.sizes), bias=bias)
        self.scan = self.new_scan()
        self.norm = self.new_norm()
        self.out_proj = Projection(d_inner, d_model, bias=bias)

    @property
    def values_beside(self) -> int:
        """What the projection gives the scan beside x, B and C."""
        return self.values_per_head * self.heads.count

    def new_scan(self) -> "SSDScan":
        """Another, freshly initialised scan over the same streams."""
        return SSDScan(self.heads, **self.scan_options)

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
        """q to C, k to B, v to x, o to the output projection; a step of 1, an open gate, and no direct path."""
        weights = weights.expanded()
        self._check_fits(weights)
        head_dim, d_model = weights.q.shape[1:]
        scale = head_dim**-0.5
        sizes = (self.sizes[0], *self.heads.sizes, self.sizes[2])
        gate, x, B, C, per_head = self.in_proj.weight.split(sizes)
        for rows, source in ((x, weights.v), (B, weights.k), (C, weights.q * scale)):
            rows.copy_(source.reshape(-1, d_model))
        self.out_proj.weight.copy_(weights.o.reshape(d_model, -1))
        for rows in (gate, per_head):  # the gate open, whatever the frame, and all frames' steps the same
            rows.zero_()
        gate, x, B, C, per_head = self.in_proj.bias.split(sizes)
        gate.fill_(GATE_OPEN)
        per_head.zero_()
        for rows, source, factor in ((x, weights.v_bias, 1.0), (B, weights.k_bias, 1.0), (C, weights.q_bias, scale)):
            rows.zero_() if source is None else rows.copy_(source.reshape(-1) * factor)
        for rows, constant in zip((B, C), constant_product(weights.k, weights.q * scale), strict=True):
            rows.add_(constant.reshape(-1))
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


def constant_product(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """What to add to the biases of keys and queries, so that every product of the two has 1 more in it.

    exp(q . k) = 1 + q . k + ...: without its 1, linear attention sees how frames differ from their mean, and not the
    mean. The two lie in that direction of a head in which keys and queries vary least, so that they change the rest of
    a product least.

    Arguments
    ---------
    keys, queries : (H, N, D), the projections.

    Returns
    -------
    Two tensors (H, N), whose products are 1 in every head.

    Example
    -------
    >>> for_keys, for_queries = constant_product(torch.randn(2, 8, 16), torch.randn(2, 8, 16))
    >>> (for_keys * for_queries).sum(-1).round(decimals=4).tolist()
    [1.0, 1.0]
    """
    spreads = [w.float() @ w.float().transpose(-1, -2) for w in (keys, queries)]
    sizes = [s.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-12) for s in spreads]
    both = sum(s / size[:, None, None] for s, size in zip(spreads, sizes, strict=True))
    direction = torch.linalg.eigh(both).eigenvectors[..., 0]
    along = [(s @ direction[..., None]).squeeze(-1).mul(direction).sum(-1).clamp(min=1e-12) for s in spreads]
    balance = (along[0] / along[1]).clamp(1e-2, 1e2)[:, None] ** 0.25
    return (direction * balance).to(keys.dtype), (direction / balance).to(queries.dtype)


class SSDState(NamedTuple):
    """What one piece of a sequence leaves for the next: the convolution's last inputs and the scan's state."""

    conv: Tensor | None  # (B, channels, d_conv - 1); None without a convolution
    ssd: Tensor  # (B, H, P, N), float32


class SSDScan(Scan):
    """Everything of Mamba-2 that looks across time: the short convolution over x, B, C, and the SSD scan.

    Its streams are x, B, C joined, (B, T, channels), and the step sizes before softplus, (B, T, H).

    Arguments
    ---------
    heads : the geometry.
    d_conv : taps of the short convolution; 0 for none (and no activation).
    activation : ``silu`` or ``identity``, after the convolution.
    dt_range, A_range : where step sizes and decay rates start; a head's memory is 1 / (dt A) frames. Where neither is
        given, a start from attention weights takes steps of 1 and a memory of 100 to 500 frames.
    skip : True adds D x, with a learned D for each head, to what the scan puts out.
    chunk_size, backend : handed to :func:`cald_speech.ops.ssd`.
    """

    op = staticmethod(ssd)  # what it hands its arguments to

    def __init__(
        self,
        heads: Heads,
        *,
        d_conv: int = 4,
        activation: str = "silu",
        dt_range: tuple[float, float] = STEPS,
        A_range: tuple[float, float] = RATES,
        skip: bool = True,
        chunk_size: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.heads = heads
        self.options = {"chunk_size": chunk_size, "backend": backend}
        self.ranges_given = (tuple(dt_range), tuple(A_range)) != (STEPS, RATES)
        self.conv1d = ShortConvolution(sum(heads.sizes), d_conv, activation=activation) if d_conv else None
        self.dt_bias = nn.Parameter(step_size_bias(heads.count, dt_range))
        self.A_log = nn.Parameter(torch.empty(heads.count).uniform_(*A_range).log())
        self.D = nn.Parameter(torch.ones(heads.count)) if skip else None

    def forward(
        self, streams: tuple[Tensor, Tensor], lengths: Tensor | None, *, state: SSDState | None, reverse: bool
    ) -> tuple[Tensor, SSDState]:
        """The streams to y (B, T, H * P)."""
        conv_state, ssd_state = (None, None) if state is None else state
        streams, conv_state = self.convolved(streams, lengths, state=conv_state, reverse=reverse)
        y, ssd_state = self.op(
            *self.arguments(streams),
            lengths=lengths,
            reverse=reverse,
            initial_state=ssd_state,
            return_final_state=True,
            **self.options,
        )
        return y.flatten(-2), SSDState(conv_state, ssd_state)

    def convolved(
        self, streams: tuple[Tensor, Tensor], lengths: Tensor | None, *, state: Tensor | None = None, reverse: bool
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """The streams as the SSD scan takes them, and the convolution's last inputs."""
        if self.conv1d is None:
            return streams, None
        xBC, dt = streams
        xBC, state = self.conv1d(xBC, lengths, state=state, reverse=reverse)
        return (xBC, dt), state

    def arguments(self, streams: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
        """x, dt, A, B, C and D, as :func:`cald_speech.ops.ssd` takes them, from convolved streams."""
        xBC, dt = streams
        x, B, C = self.split(xBC)
        return x, self.step_sizes(dt), self.decay_rates(), B, C, self.D

    def step_sizes(self, dt: Tensor) -> Tensor:
        """The projection (B, T, H) to dt > 0, in float32."""
        return F.softplus(dt.float() + self.dt_bias.float())

    def decay_rates(self) -> Tensor:
        """A < 0, (H,), in float32."""
        return -self.A_log.float().exp()

    def split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, H, P), B and C (B, T, G, N)."""
        x, B, C = xBC.split(self.heads.sizes, dim=-1)
        return (
            x.unflatten(-1, (self.heads.count, self.heads.head_dim)),
            B.unflatten(-1, (self.heads.groups, self.heads.d_state)),
            C.unflatten(-1, (self.heads.groups, self.heads.d_state)),
        )

    def with_reverse(self, other: "SSDScan", streams: tuple[Tensor, Tensor], lengths: Tensor | None) -> Tensor:
        """As :class:`Scan` says; without convolutions both directions see the same x, B and C, which are read once."""
        if self.conv1d is not None:
            return super().with_reverse(other, streams, lengths)
        xBC, dt = streams
        x, B, C = self.split(xBC)
        y = ssd_bidirectional(
            x,
            torch.stack([self.step_sizes(dt), other.step_sizes(dt)], dim=2),
            torch.stack([self.decay_rates(), other.decay_rates()]),
            B,
            C,
            None if self.D is None else self.D + other.D,
            lengths=lengths,
            **self.options,
        )
        return y.flatten(-2)

    def beside(
        self,
        other: "SSDScan",
        streams: tuple[Tensor, Tensor],
        others: tuple[Tensor, Tensor],
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As :class:`Scan` says: each direction has its own convolution, and one call scans what they put out."""
        streams, _ = self.convolved(streams, lengths, reverse=False)
        others, _ = other.convolved(others, lengths, reverse=True)
        *both, D = zip(self.arguments(streams), other.arguments(others), strict=True)
        past, future = ssd_pair(*both, None if self.D is None else D, lengths=lengths, **self.options)
        return past.flatten(-2), future.flatten(-2)

    @torch.no_grad()
    def pass_through(self) -> None:
        if self.conv1d is not None:
            self.conv1d.pass_through()
        if self.D is not None:
            self.D.zero_()
        if self.ranges_given:
            return
        self.dt_bias.fill_(STEP_OF_ONE)
        self.A_log.uniform_(*(math.log(rate) for rate in START_RATES))
        if self.conv1d is not None and self.conv1d.activation == "silu":
            self.conv1d.weight.mul_(NEARLY_LINEAR)  # the norm behind the scan makes up for it


class Mamba2(GatedMixer, CausalMixer):
    """The Mamba-2 mixer.

    Arguments
    ---------
    d_model : width D of the layer.
    num_heads : heads of the attention in whose place it stands; sets ``head_dim``, ``n_groups`` where those are None.
    options : ``head_dim``, ``d_state``, ``n_groups``, ``expand`` and ``bias`` of :class:`GatedMixer`; ``d_conv``,
        ``activation``, ``dt_range``, ``A_range``, ``chunk_size`` and ``backend`` of :class:`SSDScan`. ``d_conv: 0``
        leaves linear attention with a decay.

    Example
    -------
    >>> mixer = Mamba2(64, num_heads=4)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """
