"""What stands around the layers of a speech encoder, as pieces that long form runs one by one."""

import math
from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from torch import Tensor, nn


class Moments(NamedTuple):
    """Mean and variance of each channel over all of an audio, (C,) each."""

    mean: Tensor
    variance: Tensor


class FrontEnd(NamedTuple):
    """What stands around the layers of a speech encoder: from audio to frames, and the norm at the end.

    Frames [a, b) of ``convolutions`` are made of the samples [a * stride, (b - 1) * stride + receptive_field) alone,
    but where ``normed`` is a convolution: its output is normalised over all of the audio. For a piece of audio,
    ``convolutions`` then takes the :class:`Moments` of that output over the whole as ``moments``.
    """

    convolutions: Callable[..., Tensor]  # (B, samples) -> (B, C, T)
    projection: Callable[[Tensor], Tensor]  # (B, T, C) -> (B, T, D)
    positions: nn.Module  # the positional convolution, (B, T, D) -> (B, T, D)
    input_norm: nn.Module  # after adding the positions; Identity in pre-norm models
    output_norm: nn.Module  # after the last layer; Identity in post-norm models
    kernels: tuple[int, ...]  # of each convolution, in samples of its input
    strides: tuple[int, ...]
    positions_reach: int  # frames that the positional convolution sees on either side
    normed: nn.Conv1d | None  # the first convolution, where its output is normalised over time

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.strides)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame is made of."""
        steps = accumulate(self.strides[:-1], mul, initial=1)
        return 1 + sum((kernel - 1) * step for kernel, step in zip(self.kernels, steps, strict=True))

    def num_frames(self, num_samples: int) -> int:
        """Frames that so many samples give."""
        return max(0, (num_samples - self.receptive_field) // self.stride + 1)
