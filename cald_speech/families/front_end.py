"""What stands between audio and the layers of a speech encoder: its pieces, its norm over time, its masks.

Long form runs the pieces one by one. The norm over time of wav2vec2-base and its kin is the one place where a piece of
an audio depends on all of it, and where Hugging Face counts padding in.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families.lengths import AudioLengths
from cald_speech.families.log_mel import LogMel
from cald_speech.ops import valid_frames


class Moments(NamedTuple):
    """Mean and variance of each channel over all of an audio, (C,) each."""

    mean: Tensor
    variance: Tensor


class Piece(NamedTuple):
    """Where a piece of audio stands in the whole: its frames [start, stop), and the samples of all of the audio."""

    start: int
    stop: int
    num_samples: int


class FrontEnd(NamedTuple):
    """What stands around the layers of a speech encoder: from audio to frames, and the norm at the end.

    Frames [a, b) of ``convolutions`` are made of the samples :meth:`samples_of` (a, b) alone, but where ``normed`` is a
    convolution: its output is normalised over all of the audio. For a piece of audio, ``convolutions`` then takes the
    :class:`Moments` of that output over the whole as ``moments``. Where the convolutions pad (``lead``), it takes the
    :class:`Piece` too: their zeros stand at the ends of the audio alone.
    """

    convolutions: Callable[..., Tensor]  # (B, samples) -> (B, C, T)
    projection: Callable[[Tensor], Tensor]  # (B, T, C) -> (B, T, D)
    positions: nn.Module  # the positional convolutions, (B, T, D) -> (B, T, D)
    input_norm: nn.Module  # after adding the positions; Identity in pre-norm models
    output_norm: nn.Module  # after the last layer; Identity in post-norm models
    kernels: tuple[int, ...]  # of each convolution, in samples of its input
    strides: tuple[int, ...]
    positions_reach: int  # frames that the positional convolutions see on either side
    widest: int  # numbers that the convolution with most of them puts out for a frame
    normed: nn.Conv1d | None  # the first convolution, where its output is normalised over time
    log_mel: LogMel | None = None  # what is normalised over time in its place, where the model hears features
    lead: int = 0  # samples before the audio that the first frame would see; there are none
    squeeze: int = 1  # frames that make one of the layers', behind the positional convolutions
    needed: int | None = None  # samples of the audio that the first frame must have; None: all that it sees

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.strides)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame is made of."""
        steps = accumulate(self.strides[:-1], mul, initial=1)
        return 1 + sum((kernel - 1) * step for kernel, step in zip(self.kernels, steps, strict=True))

    def with_positions(self, x: Tensor) -> Tensor:
        """(B, T, D) projected frames to the layers' own, (B, T // squeeze, D), before the norm."""
        positions = self.positions(x)
        return (x if self.squeeze == 1 else self._averaged(x)) + positions

    def _averaged(self, x: Tensor) -> Tensor:
        if x.size(1) < self.squeeze:
            return x[:, :0]
        return nn.functional.avg_pool1d(x.transpose(1, 2), self.squeeze).transpose(1, 2)

    def num_frames(self, num_samples: int) -> int:
        """Frames that so many samples give."""
        needed = self.receptive_field if self.needed is None else self.needed
        return max(0, (num_samples - needed) // self.stride + 1)

    def samples_of(self, start: int, stop: int) -> tuple[int, int]:
        """First and last (exclusive) sample that frames [start, stop) see; what is not in the audio is not there."""
        first = start * self.stride - self.lead
        return first, first + (stop - start - 1) * self.stride + self.receptive_field


class LengthAwareGroupNorm(nn.GroupNorm):
    """GroupNorm with one channel a group (so: normalisation over time) whose statistics leave padding out.

    It takes the place of the norm in the first convolution of wav2vec2-base and its kin, where Hugging Face counts the
    padding in, so that a transcript changes with the batch. Same parameters; without padding, the same arithmetic.
    """

    @classmethod
    def replacing(cls, norm: nn.GroupNorm, conv: nn.Conv1d, context: AudioLengths) -> "LengthAwareGroupNorm":
        if norm.num_groups != norm.num_channels:
            raise ValueError(f"expected {norm.num_channels} groups, one a channel, got {norm.num_groups}")
        new = cls(norm.num_groups, norm.num_channels, eps=norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)
        new.weight, new.bias = norm.weight, norm.bias
        new.kernel, new.stride, new.context = conv.kernel_size[0], conv.stride[0], context
        return new

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T); padded positions hold finite values that nothing reads."""
        if self.context.samples is None:
            return super().forward(x)
        lengths = (self.context.samples - self.kernel).div(self.stride, rounding_mode="floor") + 1
        valid = valid_frames(lengths, x.size(-1))[:, None]
        count = lengths.clamp(min=1).float()[:, None, None]
        values = x.float()
        mean = values.masked_fill(~valid, 0).sum(-1, keepdim=True) / count
        centred = (values - mean).masked_fill(~valid, 0)
        variance = centred.square().sum(-1, keepdim=True) / count
        normed = centred * (variance + self.eps).rsqrt()
        return (normed * self.weight.float()[:, None] + self.bias.float()[:, None]).to(x.dtype)


def convolve_normed(x: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm, moments: tuple[Tensor, Tensor]) -> Tensor:
    """``norm(conv(x))`` with mean and variance (C,) of conv's output given, not taken from this piece of the audio.

    What the norm does to each channel is then a factor and a summand, which go into the kernel and its bias.
    """
    mean, variance = (m.double() for m in moments)
    factor = norm.weight.double() * (variance + norm.eps).rsqrt()
    bias = 0 if conv.bias is None else conv.bias.double()
    shift = (norm.bias.double() + (bias - mean) * factor).to(x.dtype)
    return nn.functional.conv1d(x, (conv.weight * factor[:, None, None]).to(x.dtype), shift, conv.stride)


MASK_KEYS = ("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks")
MASK_KEYS += ("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks")


class SharedMasks:
    """The same SpecAugment mask for two models: what the student does not hear, its teacher does not hear either.

    Lets ``teacher`` draw the mask that ``student`` drew last, though nothing else of it is in training mode. Hugging
    Face's speech encoders draw their masks from NumPy's global generator, by the settings in their config: with the
    student's settings and the generator put back, the teacher draws the same.

    Example
    -------
    >>> masks = SharedMasks(teacher, student)  # doctest: +SKIP
    >>> masks.remember()  # doctest: +SKIP
    >>> student(audio)  # doctest: +SKIP
    >>> with masks.drawn_again():  # doctest: +SKIP
    ...     teacher(audio)
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel):
        self.teacher, self.state = teacher.base_model, None
        if not hasattr(student.base_model.config, "mask_time_prob"):
            raise UserError(
                f"teacher_mask: expected none, since {type(student).__name__} has no SpecAugment that a teacher could "
                "share, got student. Leave it out"
            )
        for key in MASK_KEYS:
            setattr(self.teacher.config, key, getattr(student.base_model.config, key))
        embedding = student.base_model._parameters.get("masked_spec_embed")
        # A teacher that was made without masking has no vector to put in a masked frame's place.
        if embedding is not None and "masked_spec_embed" not in self.teacher._parameters:
            self.teacher.masked_spec_embed = nn.Parameter(embedding.detach().clone(), requires_grad=False)

    def remember(self) -> None:
        """To be called before the student's forward pass."""
        self.state = np.random.get_state()

    @contextmanager
    def drawn_again(self) -> Iterator[None]:
        """Inside, the teacher's encoder masks what the student's masked; the generator then goes on where it was."""
        present = np.random.get_state()
        np.random.set_state(self.state)
        self.teacher.training = True  # of the encoder alone: its layers, and their dropout, stay in evaluation mode
        try:
            yield
        finally:
            self.teacher.training = False
            np.random.set_state(present)
