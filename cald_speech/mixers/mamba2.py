"""Mamba-2: input projection, short convolution, state-space scan, gated RMS norm, output projection.

Dao & Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7. Started from attention weights, C, B and x take the
places of q, k and v ("The Mamba in the Llama", arXiv 2408.15237): the scan is then linear attention with a decay.
"""

from typing import NamedTuple

from torch import Tensor

from cald_speech.mixers.causal import CausalMixer, Scan
from cald_speech.mixers.convolution import ShortConvolution
from cald_speech.mixers.gated import GatedMixer
from cald_speech.mixers.ssd_scan import Heads, SSDScan


class Mamba2State(NamedTuple):
    """What one piece of a sequence leaves for the next: the convolution's last inputs and the scan's state."""

    conv: Tensor | None  # (B, channels, d_conv - 1)
    ssd: Tensor  # (B, H, P, N), float32


class Mamba2Scan(SSDScan):
    """Everything of Mamba-2 that looks across time: the short convolution over x, B, C, and the SSD scan.

    ``d_conv`` and ``activation`` are the convolution's (0 taps: none), the other options :class:`SSDScan`'s.
    """

    def __init__(self, heads: Heads, *, d_conv: int = 4, activation: str = "silu", **options):
        conv = ShortConvolution(sum(heads.sizes), d_conv, activation=activation) if d_conv else None
        super().__init__(heads, **options)
        self.conv1d = conv

    def pass_through(self) -> None:
        if self.conv1d is not None:
            self.conv1d.pass_through()

    def forward(
        self, streams: tuple[Tensor, Tensor], lengths: Tensor | None, *, state: Mamba2State | None, reverse: bool
    ) -> tuple[Tensor, Mamba2State]:
        """x, B, C joined (B, T, channels) and dt (B, T, H), before convolution and softplus, to y (B, T, H * P)."""
        conv_state, ssd_state = (None, None) if state is None else state
        streams, conv_state = self.convolved(streams, lengths, state=conv_state, reverse=reverse)
        y, ssd_state = super().forward(streams, lengths, state=ssd_state, reverse=reverse)
        return y, Mamba2State(conv_state, ssd_state)

    def convolved(
        self, streams: tuple[Tensor, Tensor], lengths: Tensor | None, *, state: Tensor | None = None, reverse: bool
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """The streams as the SSD scan takes them, and the convolution's last inputs."""
        if self.conv1d is None:
            return streams, state
        xBC, dt = streams
        xBC, state = self.conv1d(xBC, lengths, state=state, reverse=reverse)
        return (xBC, dt), state

    def with_reverse(self, other: "Mamba2Scan", streams: tuple[Tensor, Tensor], lengths: Tensor | None) -> Tensor:
        """As :class:`Scan` says; without convolutions both directions see the same x, B and C, which are read once."""
        if self.conv1d is not None:
            return Scan.with_reverse(self, other, streams, lengths)
        return super().with_reverse(other, streams, lengths)

    def beside(
        self,
        other: "Mamba2Scan",
        streams: tuple[Tensor, Tensor],
        others: tuple[Tensor, Tensor],
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As :class:`Scan` says: each direction has its own convolution, and one call scans what they put out."""
        streams, _ = self.convolved(streams, lengths, reverse=False)
        others, _ = other.convolved(others, lengths, reverse=True)
        return super().beside(other, streams, others, lengths)


class Mamba2(GatedMixer, CausalMixer):
    """The Mamba-2 mixer.

    Arguments
    ---------
    d_model : width D of the layer.
    num_heads : heads of the attention in whose place it stands; sets ``head_dim``, ``n_groups`` where those are None.
    d_conv : taps of the short convolution; 0 for none (and no activation), which leaves linear attention with a decay.
    activation : ``silu`` or ``identity``, after the convolution.
    options : ``head_dim``, ``d_state``, ``n_groups``, ``expand`` and ``bias`` of :class:`GatedMixer`; ``dt_range``,
        ``A_range``, ``chunk_size`` and ``backend`` of :class:`SSDScan`.

    Example
    -------
    >>> import torch
    >>> mixer = Mamba2(64, num_heads=4)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    scan_class = Mamba2Scan

    def __init__(self, d_model: int, num_heads: int = 1, *, d_conv: int = 4, activation: str = "silu", **options):
        super().__init__(d_model, num_heads, d_conv=d_conv, activation=activation, **options)
