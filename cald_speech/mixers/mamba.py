"""Mamba, the first: input projection, short convolution, selective scan, gate, output projection.

Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section 3.4. Every
channel is a head of its own, whose N state entries decay at different rates; step sizes, B and C are made from what the
convolution puts out. CALD converts Pythia to it with an inner width of 5,120 for 2,048 (``expand: 2.5``).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.mixers.base import AttentionWeights, Projection
from cald_speech.mixers.scan import GATE_OPEN, CausalMixer, Scan, ShortConvolution, Streams, step_size_bias
from cald_speech.ops import selective_scan

STEPS = (0.001, 0.1)
START_STEP = 0.01  # a memory of a hundred frames
START_PRODUCT = 0.5  # B C at the start: half of the sum that a running mean is, since B and C are not quite alike


class MambaState(NamedTuple):
    """What one piece of a sequence leaves for the next: the convolution's last inputs and the scan's state."""

    conv: Tensor  # (B, channels, d_conv - 1)
    ssm: Tensor  # (B, channels, N), float32


class MambaScan(Scan):
    """Everything of Mamba that looks across time, and the projections to step sizes, B and C in between."""

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int,
        activation: str = "silu",
        dt_range: tuple[float, float] = STEPS,
        chunk_size: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.options = {"chunk_size": chunk_size, "backend": backend}
        self.sizes, self.ranges_given = (dt_rank, d_state, d_state), tuple(dt_range) != STEPS
        self.conv1d = ShortConvolution(channels, d_conv, activation=activation)
        self.x_proj = Projection(channels, sum(self.sizes), bias=False)
        self.dt_proj = Projection(dt_rank, channels, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        self.dt_bias = nn.Parameter(step_size_bias(channels, dt_range))
        # A = -1, ..., -N: the state's entries remember over different spans (S4D-real).
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))

    @torch.no_grad()
    def pass_through(self) -> None:
        self.conv1d.pass_through()
        self.D.zero_()
        if not self.ranges_given:
            self.dt_proj.weight.zero_()
            self.dt_bias.fill_(math.log(math.expm1(START_STEP)))

    @torch.no_grad()
    def start_as_mean(self, sizes: Tensor) -> None:
        """A running mean at the start: B and C alike in every frame, as nearly as they can be made of the values.

        They are made without a bias, of what a SiLU puts out: its mean over all channels hardly changes with the frame.

        Arguments
        ---------
        sizes : (channels,), of the values that the convolution is given.
        """
        _, B, C = self.x_proj.weight.split(self.sizes)
        points = torch.linspace(-3, 3, 61, device=sizes.device)
        density = torch.exp(-points.square() / 2)
        mean = (F.silu(sizes.float()[:, None] * points) @ (density / density.sum())).sum()
        for rows in (B, C):  # of the entry that remembers longest; no other is read, until C learns to
            rows[0] = START_PRODUCT**0.5 / mean.clamp(min=1e-6)
        C[1:].zero_()

    def start_beside(self, started: "MambaScan") -> None:
        super().start_beside(started)
        with torch.no_grad():
            self.x_proj.weight.copy_(started.x_proj.weight)

    def forward(
        self, streams: tuple[Tensor], lengths: Tensor | None, *, state: MambaState | None, reverse: bool
    ) -> tuple[Tensor, MambaState]:
        """x (B, T, channels) before the convolution to y, the same."""
        conv_state, ssm_state = (None, None) if state is None else state
        x, conv_state = self.conv1d(streams[0], lengths, state=conv_state, reverse=reverse)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        y, ssm_state = selective_scan(
            x,
            self._step_sizes(dt),
            -self.A_log.float().exp(),
            B.unsqueeze(2),
            C.unsqueeze(2),
            self.D,
            lengths=lengths,
            reverse=reverse,
            initial_state=ssm_state,
            return_final_state=True,
            **self.options,
        )
        return y, MambaState(conv_state, ssm_state)

    def step_sizes(self, x: Tensor) -> Tensor:
        """What the convolution put out, (B, T, channels), to dt > 0, the same, in float32."""
        return self._step_sizes(self.x_proj(x).split(self.sizes, dim=-1)[0])

    def _step_sizes(self, dt: Tensor) -> Tensor:
        return F.softplus(self.dt_proj(dt).float() + self.dt_bias.float())


class Mamba(CausalMixer):
    """The Mamba mixer.

    Arguments
    ---------
    d_model : width D of the layer.
    num_heads : of the attention in whose place it stands; not used, every channel is on its own.
    expand : inner width over d_model, not necessarily whole; 1 allows a start from attention weights.
    bias : True gives both projections a bias, as speech encoders' attention has.
    dt_rank : width of the bottleneck before the step sizes; None takes d_model / 16, rounded up.
    options : ``d_state`` (16), ``d_conv`` (4 taps), ``activation`` (``silu`` or ``identity``, after the convolution),
        ``dt_range`` (where step sizes start, log-uniformly: 0.001 to 0.1, or where it is not given and the start is
        from attention, 0.01), and ``chunk_size`` and ``backend`` of
        :func:`cald_speech.ops.selective_scan`.

    Example
    -------
    >>> mixer = Mamba(64, expand=2.5)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 1,
        *,
        expand: float = 1,
        bias: bool = True,
        dt_rank: int | None = None,
        **options,
    ):
        super().__init__()
        self.d_inner = round(expand * d_model)
        if self.d_inner < 1:
            raise ValueError(f"expand: expected more than 0, got {expand}, an inner width of {self.d_inner}")
        self.scan_options = {"dt_rank": dt_rank or math.ceil(d_model / 16), **options}
        self.in_proj = Projection(d_model, 2 * self.d_inner, bias=bias)
        self.scan = self.new_scan()
        self.out_proj = Projection(self.d_inner, d_model, bias=bias)

    def new_scan(self) -> MambaScan:
        return MambaScan(self.d_inner, **self.scan_options)

    def project(self, x: Tensor) -> Streams:
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        return Streams((x,), gate)

    def finish(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(y * F.silu(gate))

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """v to x, o to the output projection; the gate starts open.

        q and k have no place: B and C are made from x, by projections that no attention has. They start as a
        running mean of the values.
        """
        weights = weights.expanded()
        values = weights.v.flatten(0, 1)
        if len(values) != self.d_inner:
            raise ValueError(
                f"a start from attention weights needs the inner width of the attention, {len(values)}: got "
                f"{self.d_inner}. Leave expand at 1, or start at random"
            )
        if self.in_proj.bias is None:
            raise ValueError(
                "a start from attention weights needs bias: True, for the attention's biases and an open gate. Set it, "
                "or start at random"
            )
        x, gate = self.in_proj.weight.chunk(2)
        x.copy_(values)
        gate.zero_()  # a random gate would turn the sign of half of the copied values
        x, gate = self.in_proj.bias.chunk(2)
        x.zero_() if weights.v_bias is None else x.copy_(weights.v_bias.flatten())
        gate.fill_(GATE_OPEN)
        self.out_proj.weight.copy_(weights.o.flatten(1))
        self.out_proj.bias.zero_() if weights.o_bias is None else self.out_proj.bias.copy_(weights.o_bias)
        self.scan.pass_through()
        if not self.scan.ranges_given:
            # Values of a normed input have the size of their row of W_v.
            self.scan.start_as_mean(values.norm(dim=-1))
        return frozenset({"in_proj.weight", "out_proj.weight", "in_proj.bias", "out_proj.bias"})
