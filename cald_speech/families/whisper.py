"""Whisper's encoder (Radford et al., arXiv 2212.04356), for classification: a window of 30 s of log-mel features.

Audio enters as one window, always: the feature extractor pads it with silence, and the model was trained to hear that
silence, so every frame of the window is valid in every layer and in the mean that is classified. A result hangs on no
batch, and zeros after the audio change nothing, in a converted model as in Hugging Face's own. The mask that the
feature extractor can give (``return_attention_mask``) is accepted, and no layer reads it; in training it keeps
SpecAugment to the audio, where SpecAugment is on. The positions are a table of one window: longer audio is refused.

Converted models are CaldWhisperForAudioClassification, which conversion/classes.py makes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, WhisperConfig, WhisperForAudioClassification
from transformers.models.whisper.modeling_whisper import WhisperModel

from cald_speech.errors import UserError
from cald_speech.families.base import Family, Opened, weights_by_head
from cald_speech.families.front_end import FrontEnd
from cald_speech.families.lengths import Lengths, MixerSlot
from cald_speech.families.speech import BlockAttention, SpeechFamily
from cald_speech.mixers import AttentionWeights, Mixer

STRIDE = 2  # of the front end: frames of features for one of the layers
FRAMES_PER_S = 100  # of features


class NotOneWindow(UserError, ValueError):
    """Features that are not those of one window."""


class WindowLengths(Lengths):
    """Of models whose input is one whole window: all of its frames are valid."""

    def __init__(self, config: PretrainedConfig):
        self.config = config

    def hook(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook: refuses features that are no window, and masks them where SpecAugment is on."""
        features = args[0] if args else kwargs.get("input_features")
        if features is None:  # the encoder's output is given
            return None
        expected = (self.config.num_mel_bins, STRIDE * self.config.max_source_positions)
        if tuple(features.shape[1:]) != expected:
            seconds = self.config.max_source_positions * STRIDE / FRAMES_PER_S
            raise NotOneWindow(
                f"input_features: expected windows of {seconds:g} s, {expected[0]} channels of {expected[1]} frames, "
                f"got {' x '.join(map(str, features.shape[1:]))}. The model's own feature extractor "
                f"(WhisperFeatureExtractor) pads shorter audio; the encoder has {self.config.max_source_positions} "
                "positions and hears no more: cut longer audio into windows"
            )
        if not (model.training and self.config.apply_spec_augment):
            return None
        # transformers masks for Whisper's other heads alone. The features are the caller's: masked is a copy.
        masked = WhisperModel._mask_input_features(model, features.clone(), kwargs.get("attention_mask"))
        return ((masked, *args[1:]), kwargs) if args else (args, kwargs | {"input_features": masked})


class WhisperFamily(SpeechFamily):
    """Every size, with a classification head; the decoder of a checkpoint that transcribes is left out."""

    model_type = "whisper"
    config_class = WhisperConfig
    heads = ("classification",)
    model_classes = (WhisperForAudioClassification,)
    default_head = "classification"
    config_defaults = {"encoder_layerdrop": 0.0}  # noqa: RUF012
    optional_names = ()
    leftover_names = (r"decoder\.", r"proj_out\.")
    input_key = "input_features"

    def overrides(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A share to be masked that is given turns SpecAugment on, which Whisper's configs have off.

        The other share, of time or channels, is then 0 unless it is given too.
        """
        shares = ("mask_time_prob", "mask_feature_prob")
        if any(values.get(share) for share in shares) and "apply_spec_augment" not in values:
            return {**dict.fromkeys(shares, 0.0), **values, "apply_spec_augment": True}
        return dict(values)

    def new_lengths(self, base: PreTrainedModel) -> WindowLengths:
        return WindowLengths(base.config)

    def frame_lengths(self, sizes: Tensor, config: PretrainedConfig) -> Tensor:
        return (sizes - 1).div(STRIDE, rounding_mode="floor") + 1

    def inputs(self, values: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        return {self.input_key: values.transpose(1, 2)}

    def traits(self, config: PretrainedConfig) -> dict[str, Any]:
        own = {"features": config.num_mel_bins, "positions": config.max_source_positions}
        return Family.traits(self, config) | own

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.encoder.layers

    def open(self, layer: nn.Module) -> Opened:
        def dropped(x: Tensor, share: float) -> Tensor:
            return F.dropout(x, p=share, training=layer.training)

        def slot(x: Tensor, *, lengths: Tensor | None = None, **arguments: Any) -> Tensor:
            if isinstance(layer.self_attn, MixerSlot):
                return layer.self_attn.mixer(x, lengths)
            return layer.self_attn(x, **arguments)[0]

        def after(x: Tensor, y: Tensor) -> Tensor:
            x = x + dropped(y, layer.dropout)
            y = dropped(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))), layer.activation_dropout)
            x = x + dropped(layer.fc2(y), layer.dropout)
            if x.dtype == torch.float16:  # as Hugging Face's layer does
                most = torch.finfo(x.dtype).max - 1000
                x = x.clamp(-most, most)
            return x

        return Opened(layer.self_attn_layer_norm, slot, after)

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        return layer.self_attn, layer.self_attn

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        return {"attention_mask": None}

    def block_attention(self, model: PreTrainedModel, layer: nn.Module) -> BlockAttention:
        return BlockAttention(layer.self_attn)

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        attention = self.attention(layer)
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        return weights_by_head(*inputs, attention.out_proj, heads=attention.num_heads)

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        self.layers(model)[index].self_attn = self.slot_class(mixer, self.context(model))

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return model.encoder.layer_norm

    def front_end(self, model: PreTrainedModel) -> FrontEnd:
        seconds = model.config.max_source_positions * STRIDE / FRAMES_PER_S
        raise UserError(
            f"expected a model that hears audio of any length, got a Whisper encoder: it hears windows of {seconds:g} "
            "s, and nothing across them. Classify with `cald-speech labels`, a window or less at a time"
        )

    def freeze_front_end(self, model: PreTrainedModel) -> None:
        for convolution in (model.encoder.conv1, model.encoder.conv2):
            convolution.requires_grad_(False)

    def constants(self, model: PreTrainedModel) -> Iterator[nn.Parameter]:
        """The sines and cosines of the positions."""
        return model.encoder.embed_positions.parameters()


FAMILY = WhisperFamily()
