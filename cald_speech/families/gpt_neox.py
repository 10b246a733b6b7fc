"""GPT-NeoX (Black et al., arXiv 2204.06745), the architecture of Pythia (arXiv 2304.01373).

Converted models are CaldGPTNeoXModel, CaldGPTNeoXForCausalLM and CaldGPTNeoXForSequenceClassification, which
conversion/classes.py makes.
"""

from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
    PreTrainedModel,
)

from cald_speech.families.text import TextDecoderFamily
from cald_speech.mixers import AttentionWeights


class GPTNeoXFamily(TextDecoderFamily):
    """Parallel residual (Pythia: attention and feed-forward read the same input) and sequential; CALD takes Mamba."""

    model_type = "gpt_neox"
    config_class = GPTNeoXConfig
    model_classes = (GPTNeoXModel, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification)
    slot_name = "attention"
    cache_argument = "layer_past"
    norm_name = "final_layer_norm"

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        y = layer.post_attention_dropout(y)
        if layer.use_parallel_residual:
            return layer.post_mlp_dropout(layer.mlp(layer.post_attention_layernorm(x))) + y + x
        y = y + x
        return layer.post_mlp_dropout(layer.mlp(layer.post_attention_layernorm(y))) + y

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        """q, k and v are one projection, whose rows are the first head's q, k and v, then the second head's, ..."""
        attention = self.attention(layer)
        fused, output, heads = attention.query_key_value, attention.dense, model.config.num_attention_heads
        q, k, v = fused.weight.unflatten(0, (heads, 3, -1)).unbind(1)
        weights = AttentionWeights(q, k, v, output.weight.unflatten(1, (heads, -1)), o_bias=output.bias)
        if fused.bias is None:
            return weights
        q_bias, k_bias, v_bias = fused.bias.unflatten(0, (heads, 3, -1)).unbind(1)
        return AttentionWeights(q, k, v, weights.o, q_bias, k_bias, v_bias, output.bias)


FAMILY = GPTNeoXFamily()
