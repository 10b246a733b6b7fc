"""SEW (Wu et al., arXiv 2109.06870): wav2vec2 whose layers run at half the rate of its output, or a lower one.

Before the layers, frames are averaged by twos (``squeeze_factor``) and a positional convolution has that stride; behind
them, a layer's frame becomes two again. A frame at the end that makes no pair is heard by that convolution alone: no
layer sees it, and the head hears zeros there.

Converted models are CaldSEWModel, CaldSEWForCTC and CaldSEWForSequenceClassification, which conversion/classes.py
makes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    SEWConfig,
    SEWForCTC,
    SEWForSequenceClassification,
    SEWModel,
)

from cald_speech.errors import UserError
from cald_speech.families.front_end import FrontEnd
from cald_speech.families.lengths import AudioLengths, frame_lengths
from cald_speech.families.speech import SpeechFamily
from cald_speech.ops import valid_frames


class TooShort(UserError, ValueError):
    """Audio without a frame for the layers."""


class SqueezedLengths(AudioLengths):
    """Lengths in the layers' frames: a pair of frames with padding in it is none, as when the audio stands alone."""

    mask: dict[str, Any] | None = None  # of attention, for this batch

    def hook(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        super().hook(base, args, kwargs)
        self.mask = None
        samples = (args[0] if args else kwargs["input_values"]).size(-1)
        if not self.frames_of(torch.tensor(samples)):
            raise TooShort(
                f"input_values: expected audio with a frame for the layers, {self.config.squeeze_factor} frames of the "
                f"convolutions, got {samples} samples, which have fewer. Leave it out"
            )

    def frames_of(self, sizes: Tensor) -> Tensor:
        return frame_lengths(sizes, self.config) // self.config.squeeze_factor

    def silence_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of the upsampling, (B, T, D): zeros behind what a layer's last frame became."""
        if self.frames is None:
            return output
        return output.masked_fill(~valid_frames(self.frames * self.config.squeeze_factor, output.size(1))[..., None], 0)


class SqueezedPositions(nn.Module):
    """(B, T, D) to what the positional convolution puts out for the layers' frames, (B, T // factor, D)."""

    def __init__(self, convolution: nn.Module, factor: int):
        super().__init__()
        self.convolution, self.factor = convolution, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)[:, : x.size(1) // self.factor]


class SEWFamily(SpeechFamily):
    """Every size and squeeze factor; both front-end norms, post-norm layers."""

    model_type = "sew"
    config_class = SEWConfig
    model_classes = (SEWModel, SEWForCTC, SEWForSequenceClassification)

    def new_lengths(self, base: PreTrainedModel) -> SqueezedLengths:
        """Lengths, and masks of attention and an output that are, in a batch, those of each utterance alone.

        Hugging Face lets the layers see a pair of frames of which one is padding.
        """
        context = self.norm_with(base, SqueezedLengths(base.config))
        base.encoder.upsample.register_forward_hook(context.silence_output)

        def mask(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if context.frames is None:
                return args, kwargs
            if context.mask is None:
                context.mask = self.masks(base, args[0], context.frames)
            return args, kwargs | context.mask

        for layer in base.encoder.layers:
            layer.register_forward_pre_hook(mask, with_kwargs=True)
        return context

    def masks(self, base: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        # An utterance without a frame of the layers sees one: what comes of it is not read, and must be a number.
        return super().layer_arguments(base, x, None if lengths is None else lengths.clamp(min=1))

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        return self.masks(model.base_model, x, lengths)

    def layer_frames(self, frames: Tensor, config: PretrainedConfig) -> Tensor:
        return frames // config.squeeze_factor

    def front_end(self, model: PreTrainedModel) -> FrontEnd:
        base = model.base_model

        def projection(x: Tensor) -> Tensor:
            x = base.layer_norm(x)
            return base.feature_projection(x) if base.project_features else x

        squeeze = base.config.squeeze_factor
        reach = -(-self.positions_reach(base.config) // squeeze) * squeeze
        positions = SqueezedPositions(base.encoder.pos_conv_embed, squeeze)
        front = super().front_end(model)
        return front._replace(projection=projection, positions=positions, positions_reach=reach, squeeze=squeeze)

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        project = super().head(model)
        return lambda x: project(model.base_model.encoder.upsample(x))

    def rest(self, model: PreTrainedModel, count: int) -> Tensor:
        zeros = torch.zeros(count, model.config.hidden_size, dtype=model.dtype, device=model.device)
        return super().head(model)(zeros)


FAMILY = SEWFamily()
