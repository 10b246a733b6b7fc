"""wav2vec2-BERT (arXiv 2312.05187): a conformer that hears log-mel features instead of samples.

Its convolutions are causal, and its attention adds a learned key for each distance, of 64 frames back and 8 ahead.

Converted models are CaldWav2Vec2BertModel, CaldWav2Vec2BertForCTC and CaldWav2Vec2BertForSequenceClassification, which
conversion/classes.py makes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertForSequenceClassification,
    Wav2Vec2BertModel,
)

from cald_speech.families.base import Family
from cald_speech.families.front_end import FrontEnd, Moments
from cald_speech.families.lengths import FeatureLengths
from cald_speech.families.log_mel import SeamlessLogMel
from cald_speech.families.speech import check_last_is_layer
from cald_speech.families.wav2vec2_conformer import NoPositions, Wav2Vec2ConformerFamily
from cald_speech.ops import valid_frames

STACKED = 2  # frames of features that make one of the model's


class Wav2Vec2BertFamily(Wav2Vec2ConformerFamily):
    """Every kind of positions, any depth and width, without an adapter."""

    model_type = "wav2vec2-bert"
    config_class = Wav2Vec2BertConfig
    model_classes = (Wav2Vec2BertModel, Wav2Vec2BertForCTC, Wav2Vec2BertForSequenceClassification)
    leftover_names = (*Wav2Vec2ConformerFamily.leftover_names, r"intermediate_ffn\.")  # before an adapter
    input_key = "input_features"

    def overrides(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A model that is asked to do without an adapter does without the feed-forward before it too."""
        without = {"use_intermediate_ffn_before_adapter": False} if values.get("add_adapter") is False else {}
        return {**without, **values}

    def new_lengths(self, base: PreTrainedModel) -> FeatureLengths:
        context = FeatureLengths(base.config)
        self.hide_padding(base, context)
        return context

    def frame_lengths(self, sizes: Tensor, config: PretrainedConfig) -> Tensor:
        return sizes

    def traits(self, config: PretrainedConfig) -> dict[str, Any]:
        return Family.traits(self, config) | {"features": config.feature_projection_input_dim}

    def reach(self, layer: nn.Module) -> int:
        return layer.conv_module.depthwise_conv.kernel_size[0] - 1

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        mask = None if lengths is None else valid_frames(lengths, x.size(1))
        return super().layer_arguments(model, x, lengths) | {"conv_attention_mask": mask}

    def front_end(self, model: PreTrainedModel) -> FrontEnd:
        check_last_is_layer(model)
        base, none = model.base_model, nn.Identity()
        log_mel = SeamlessLogMel(base.config.feature_projection_input_dim // STACKED)

        def features(audio: Tensor, moments: Moments) -> Tensor:
            x = log_mel.normalised(log_mel(audio[0]), *moments).to(base.feature_projection.projection.weight)
            return x[: len(x) // STACKED * STACKED].reshape(1, -1, STACKED * log_mel.channels).transpose(1, 2)

        return FrontEnd(
            features,
            lambda x: base.feature_projection(x)[0],
            NoPositions(),
            none,
            none,
            kernels=(log_mel.window, STACKED),
            strides=(log_mel.hop, STACKED),
            positions_reach=0,
            widest=STACKED * log_mel.channels,
            normed=None,
            log_mel=log_mel,
        )

    def freeze_front_end(self, model: PreTrainedModel) -> None:
        """There is nothing to freeze: features are no weights."""


FAMILY = Wav2Vec2BertFamily()
