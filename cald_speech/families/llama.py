"""Llama (Touvron et al., arXiv 2302.13971), with grouped keys and values from its second release on.

Converted models are CaldLlamaModel, CaldLlamaForCausalLM and CaldLlamaForSequenceClassification, which
conversion/classes.py makes.
"""

from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
)

from cald_speech.families.base import weights_by_head
from cald_speech.families.text import TextDecoderFamily
from cald_speech.mixers import AttentionWeights


class LlamaFamily(TextDecoderFamily):
    """All sizes of releases 1 to 3, and whatever else says ``llama`` in its config."""

    model_type = "llama"
    config_class = LlamaConfig
    model_classes = (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification)
    slot_name = "self_attn"
    cache_argument = "past_key_values"
    norm_name = "norm"

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x + y
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        """Keys and values have ``num_key_value_heads`` heads, each for several of the queries'."""
        attention = self.attention(layer)
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        return weights_by_head(*inputs, attention.o_proj, head_dim=attention.head_dim)


FAMILY = LlamaFamily()
