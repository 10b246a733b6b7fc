"""What all families that read text have in common: the Auto classes of their heads, and how padding is seen."""

from typing import ClassVar

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from cald_speech.families.base import Family
from cald_speech.families.token_lengths import TokenLengths


class TextFamily(Family):
    """A Hugging Face model of tokens; :class:`EncoderFamily` and :class:`DecoderFamily` know its layers."""

    auto_classes: ClassVar = {
        "base": AutoModel,
        "lm": AutoModelForCausalLM,
        "masked_lm": AutoModelForMaskedLM,
        "classification": AutoModelForSequenceClassification,
    }
    pipelines: ClassVar = {
        "base": "feature-extraction",
        "lm": "text-generation",
        "masked_lm": "fill-mask",
        "classification": "text-classification",
    }

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        # Masks hide padding from attention; lengths are there for mixers, and read from the first mixer on.
        return model

    def max_tokens(self, config: PretrainedConfig) -> int:
        return config.max_position_embeddings

    def new_lengths(self, base: nn.Module) -> TokenLengths:
        return TokenLengths(left_padding=self.causal)
