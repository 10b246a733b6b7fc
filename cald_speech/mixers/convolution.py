"""The short convolution in front of the Mamba family's scans: every channel has its own few taps."""

import torch
from torch import Tensor, nn

from cald_speech.ops import short_conv


class ShortConvolution(nn.Conv1d):
    """A causal depthwise convolution with an activation, in either direction and in pieces.

    Arguments
    ---------
    channels : width of what it filters.
    d_conv : taps, the last of which weighs the present frame.
    activation : ``silu`` or ``identity``.

    Example
    -------
    >>> conv = ShortConvolution(8, d_conv=4, activation="identity")
    >>> conv.pass_through()
    >>> x = torch.randn(1, 5, 8)
    >>> y, state = conv(x)
    >>> torch.equal(x, y), state.shape  # the last three inputs, for the next piece
    (True, torch.Size([1, 8, 3]))
    """

    def __init__(self, channels: int, d_conv: int, *, activation: str = "silu"):
        super().__init__(channels, channels, d_conv, groups=channels)
        self.activation = activation

    @torch.no_grad()
    def pass_through(self) -> None:
        """Let the present frame through and nothing else."""
        self.weight.zero_()
        self.weight[..., -1] = 1.0
        self.bias.zero_()

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, *, state: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(B, T, channels) to the same, and the scan's last inputs (B, channels, d_conv - 1)."""
        return short_conv(
            x,
            self.weight.squeeze(1),
            self.bias,
            lengths=lengths,
            reverse=reverse,
            initial_state=state,
            return_final_state=True,
            activation=self.activation,
        )
