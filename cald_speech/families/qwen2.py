"""Qwen2 (Yang et al., arXiv 2407.10671) and 2.5: Llama's layers with biases; some have a window in the later ones.

Converted models are CaldQwen2Model, CaldQwen2ForCausalLM and CaldQwen2ForSequenceClassification, which
conversion/classes.py makes.
"""

from typing import Any

from torch import nn
from transformers import (
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)
from transformers.masking_utils import create_sliding_window_causal_mask

from cald_speech.families.llama import LlamaFamily


class Qwen2Family(LlamaFamily):
    """Dense models of all sizes."""

    model_type = "qwen2"
    config_class = Qwen2Config
    model_classes = (Qwen2Model, Qwen2ForCausalLM, Qwen2ForSequenceClassification)

    def masks(self, config: PretrainedConfig, options: dict[str, Any]) -> Any:
        masks = {"full_attention": super().masks(config, options)}
        if "sliding_attention" in config.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**options)
        return masks

    def of_layer(self, layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        mask = arguments["attention_mask"][self.attention(layer).layer_type]
        return {**arguments, "attention_mask": mask}


FAMILY = Qwen2Family()
