"""What the rest of the house knows about a pretrained architecture, and nothing more (floor F2)."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cald_speech.families.block_attention import BlockAttention
from cald_speech.mixers import AttentionWeights, Mixer


class Opened(NamedTuple):
    """A layer in three pieces: ``after(x, slot(before(x), **arguments)) == layer(x, **arguments)`` to the bit."""

    before: Callable[[Tensor], Tensor]
    slot: Callable[..., Tensor]
    after: Callable[[Tensor, Tensor], Tensor]


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


class Family:
    """One pretrained architecture: its layers, the slot in each, its attention weights, its front end.

    ``model_type`` is Hugging Face's name; ``classes`` maps a head (``base``, ``ctc``, ``classification``) to the model
    class with it.
    """

    model_type: str
    config_class: type[PretrainedConfig]
    classes: Mapping[str, type[PreTrainedModel]]

    def load(
        self, source: str | PretrainedConfig, *, model_class: type[PreTrainedModel] | None = None, **overrides: Any
    ) -> PreTrainedModel:
        """A prepared model from a hub id or folder, or one with random weights from a config."""
        raise NotImplementedError

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make padding invisible to the model, in place; converting and loading do this themselves."""
        raise NotImplementedError

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """The layers, first to last; each has one slot."""
        raise NotImplementedError

    def open(self, layer: nn.Module) -> Opened:
        """The layer in three pieces. Slots with attention need :meth:`layer_arguments`, converted ones ``lengths``."""
        raise NotImplementedError

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The module whose input is the slot's, (B, T, D), and the one whose output is; often one and the same."""
        raise NotImplementedError

    def mixer(self, layer: nn.Module) -> Mixer | None:
        """What fills the layer's slot; None where attention was kept."""
        raise NotImplementedError

    def block_attention(self, model: PreTrainedModel, layer: nn.Module) -> BlockAttention:
        """The attention that a layer of ``model`` kept, as something that takes its queries block by block."""
        raise NotImplementedError

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        """What the encoder hands to each layer, beside its input, for an input like ``x`` (B, T, D)."""
        raise NotImplementedError

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        """The projections of a layer of ``model`` that has attention; raises ValueError for one that is converted."""
        raise NotImplementedError

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        """Put the mixer into a layer's slot, which keeps its call signature and return arity."""
        raise NotImplementedError

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """The norm that the last layer's output goes through before the head; Identity if there is none."""
        raise NotImplementedError

    def front_end(self, model: PreTrainedModel) -> FrontEnd:
        """The pieces before and around the layers."""
        raise NotImplementedError

    def freeze_front_end(self, model: PreTrainedModel) -> None:
        """What stands before the first layer and needs no training: its parameters get no gradient from here on."""
        raise NotImplementedError

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """From the final norm's output (B, T, D) to logits (B, T, V). Raises UserError for a model without a head."""
        raise NotImplementedError
