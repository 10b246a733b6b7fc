"""ModernBERT (Warner et al., arXiv 2412.13663): pre-norm layers with rotary positions, most with local attention.

Layers that are kept keep the kind that they have: attention to everything, or to a window.

Converted models are CaldModernBertModel, CaldModernBertForMaskedLM and CaldModernBertForSequenceClassification, which
conversion/classes.py makes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertModel,
    PreTrainedModel,
)
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

from cald_speech.families.text import WholeSlotEncoderFamily
from cald_speech.mixers import AttentionWeights
from cald_speech.ops import valid_frames


class ModernBertFamily(WholeSlotEncoderFamily):
    """Base and large."""

    model_type = "modernbert"
    config_class = ModernBertConfig
    model_classes = (ModernBertModel, ModernBertForMaskedLM, ModernBertForSequenceClassification)
    head_names = (r"head\.", r"decoder\.", r"classifier\.")
    slot_name = "attn"

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.base_model.layers

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer.attn_norm(x)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x + y
        return x + layer.mlp(layer.mlp_norm(x))

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        base = model.base_model
        mask = None if lengths is None else valid_frames(lengths, x.size(1))
        options = {"config": base.config, "inputs_embeds": x, "attention_mask": mask}
        positions = torch.arange(x.size(1), device=x.device)[None]
        return {
            "attention_mask": {
                "full_attention": create_bidirectional_mask(**options),
                "sliding_attention": create_bidirectional_sliding_window_mask(**options),
            },
            "position_embeddings": {kind: base.rotary_emb(x, positions, kind) for kind in set(base.config.layer_types)},
        }

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        """q, k and v are one projection: all of q, then all of k, then all of v."""
        attention, heads = self.attention(layer), model.config.num_attention_heads
        fused, output = attention.Wqkv, attention.Wo
        weights = (*fused.weight.unflatten(0, (3, heads, -1)), output.weight.unflatten(1, (heads, -1)))
        biases = (None, None, None) if fused.bias is None else fused.bias.unflatten(0, (3, heads, -1))
        return AttentionWeights(*weights, *biases, output.bias, positions="rotary")

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return model.base_model.final_norm

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        self.check_head(model)
        return lambda x: model.decoder(model.head(x))


FAMILY = ModernBertFamily()
