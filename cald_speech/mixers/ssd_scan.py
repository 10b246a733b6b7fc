"""The scan of Mamba-2 and its kin: a state for each head that decays by one factor a frame (arXiv 2405.21060)."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.mixers.causal import Scan
from cald_speech.ops import ssd, ssd_bidirectional, ssd_pair


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


class SSDScan(Scan):
    """SSD over the streams x, B, C, joined (B, T, channels), and the step sizes before softplus (B, T, H).

    Arguments
    ---------
    heads : the geometry.
    dt_range, A_range : where step sizes and decay rates start; a head's memory is 1 / (dt A) frames.
    skip : True adds D x, with a learned D for each head, to what the scan puts out.
    chunk_size, backend : handed to :func:`cald_speech.ops.ssd`.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        dt_range: tuple[float, float] = (0.001, 0.1),
        A_range: tuple[float, float] = (1.0, 16.0),
        skip: bool = True,
        chunk_size: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.heads = heads
        self.options = {"chunk_size": chunk_size, "backend": backend}
        self.dt_bias = nn.Parameter(step_size_bias(heads.count, dt_range))
        self.A_log = nn.Parameter(torch.empty(heads.count).uniform_(*A_range).log())
        self.D = nn.Parameter(torch.ones(heads.count)) if skip else None

    def forward(
        self, streams: tuple[Tensor, Tensor], lengths: Tensor | None, *, state: Any, reverse: bool
    ) -> tuple[Tensor, Any]:
        """The streams to y (B, T, H * P) and the state (B, H, P, N)."""
        y, state = ssd(
            *self.arguments(streams),
            lengths=lengths,
            reverse=reverse,
            initial_state=state,
            return_final_state=True,
            **self.options,
        )
        return y.flatten(-2), state

    def with_reverse(self, other: "SSDScan", streams: tuple[Tensor, Tensor], lengths: Tensor | None) -> Tensor:
        """As :class:`Scan` says: both directions see the same x, B and C, which are read once."""
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
        """As :class:`Scan` says, in one call of :func:`cald_speech.ops.ssd_pair`."""
        past, future = self.arguments(streams), other.arguments(others)
        *both, D = zip(past, future, strict=True)
        outputs = ssd_pair(*both, None if self.D is None else D, lengths=lengths, **self.options)
        return outputs[0].flatten(-2), outputs[1].flatten(-2)

    def arguments(self, streams: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
        """x, dt, A, B, C and D, as :func:`cald_speech.ops.ssd` takes them."""
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


def step_size_bias(count: int, dt_range: tuple[float, float]) -> Tensor:
    """Biases (count,) whose softplus is log-uniform in ``dt_range``: from a frame's memory to a thousand frames'.

    Example
    -------
    >>> dt = F.softplus(step_size_bias(100, (0.01, 0.1)))
    >>> bool((dt > 0.0099).all() and (dt < 0.101).all())
    True
    """
    dt = torch.exp(torch.empty(count).uniform_(math.log(dt_range[0]), math.log(dt_range[1])))
    return dt + torch.log(-torch.expm1(-dt))
