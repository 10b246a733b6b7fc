"""What the rest of the house knows about a pretrained architecture, and nothing more (floor F2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cald_speech.mixers import AttentionWeights, Mixer


class Opened(NamedTuple):
    """A layer in three pieces: ``after(x, slot(before(x), **arguments)) == layer(x, **arguments)`` to the bit."""

    before: Callable[[Tensor], Tensor]
    slot: Callable[..., Tensor]
    after: Callable[[Tensor, Tensor], Tensor]


class FrontEnd(NamedTuple):
    """What stands between the audio and the first layer of a speech encoder."""

    convolutions: nn.Module  # (B, samples) -> (B, C, T)
    projection: Callable[[Tensor], Tensor]  # (B, T, C) -> (B, T, D)
    positions: nn.Module  # the positional convolution, (B, T, D) -> (B, T, D)
    input_norm: nn.Module  # after adding the positions; Identity in pre-norm models
    output_norm: nn.Module  # after the last layer; Identity in post-norm models


class Family:
    """One pretrained architecture: its layers, the slot in each, its attention weights, its front end.

    ``model_type`` is Hugging Face's name; ``classes`` maps a head (``base``, ``ctc``) to the model class with it.
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

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        """What the encoder hands to each layer, beside its input, for an input like ``x`` (B, T, D)."""
        raise NotImplementedError

    def attention_weights(self, layer: nn.Module) -> AttentionWeights:
        """The projections of a layer that has attention; raises ValueError for one that is converted."""
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
