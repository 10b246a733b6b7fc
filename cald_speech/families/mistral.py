"""Mistral (Jiang et al., arXiv 2310.06825): Llama's layers; releases with a sliding window keep it in kept layers.

Converted models are CaldMistralModel, CaldMistralForCausalLM and CaldMistralForSequenceClassification, which
conversion/classes.py makes.
"""

from typing import Any

from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
    PretrainedConfig,
)
from transformers.masking_utils import create_sliding_window_causal_mask

from cald_speech.families.llama import LlamaFamily


class MistralFamily(LlamaFamily):
    """All releases of dense models that say ``mistral`` in their config."""

    model_type = "mistral"
    config_class = MistralConfig
    model_classes = (MistralModel, MistralForCausalLM, MistralForSequenceClassification)

    def masks(self, config: PretrainedConfig, options: dict[str, Any]) -> Any:
        if config.sliding_window is None:
            return super().masks(config, options)
        return create_sliding_window_causal_mask(**options)


FAMILY = MistralFamily()
