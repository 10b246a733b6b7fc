"""How the number of valid frames reaches the slots and norms inside a Hugging Face model.

A pre-hook on the base model takes the 2-D attention mask, works the lengths out once for each forward pass, and keeps
them: gradient checkpointing calls the slots again during backward, so they must outlive the forward pass.
"""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from cald_speech.ops import valid_frames


def frame_lengths(samples: Tensor, config: PretrainedConfig) -> Tensor:
    """How many frames the convolutional front end makes of so many samples (any integer shape).

    Example
    -------
    >>> from transformers import Wav2Vec2Config
    >>> frame_lengths(torch.tensor([16_000, 400, 0]), Wav2Vec2Config()).tolist()
    [49, 1, 0]
    """
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel).div(stride, rounding_mode="floor") + 1
    return samples.clamp(min=0)


class Lengths:
    """Of the batch that a model is working on: ``frames`` (B,) that are valid in its layers, None where all are."""

    frames: Tensor | None = None

    def hook(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the base model, which reads the lengths off its arguments."""
        raise NotImplementedError


class LengthContext(Lengths):
    """Those of audio: ``samples`` (B,) before the convolutional front end, ``frames`` after it."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.samples: Tensor | None = None

    def hook(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the base model: reads ``attention_mask``, (B, samples) ones and zeros."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self.samples = self.frames = None
        if mask is None:
            return
        lengths = mask.long().sum(-1)  # a mask of floats or booleans counts the same
        # One device sync for each forward pass: it tells padded from unpadded, and left from right.
        if bool((lengths == mask.size(-1)).all()):
            return
        if not torch.equal(valid_frames(lengths, mask.size(-1)), mask.bool()):
            raise ValueError(
                "attention_mask: expected ones and then zeros in each row (right padding), got another pattern. "
                "Pad on the right: feature_extractor.padding_side = 'right'"
            )
        self.samples = lengths
        self.frames = frame_lengths(lengths, self.config)


class LengthAwareGroupNorm(nn.GroupNorm):
    """GroupNorm with one channel a group (so: normalisation over time) whose statistics leave padding out.

    It takes the place of the norm in the first convolution of wav2vec2-base and its kin, where Hugging Face counts the
    padding in, so that a transcript changes with the batch. Same parameters; without padding, the same arithmetic.
    """

    @classmethod
    def replacing(cls, norm: nn.GroupNorm, conv: nn.Conv1d, context: LengthContext) -> "LengthAwareGroupNorm":
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
