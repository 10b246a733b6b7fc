"""GPT-2 (Radford et al., 2019): learned positions, and q, k and v in one projection whose weight is transposed.

Converted models are CaldGPT2Model, CaldGPT2LMHeadModel and CaldGPT2ForSequenceClassification, which
conversion/classes.py makes.

Positions count from the first column: rows that are padded in front need ``position_ids``, which ``generate`` gives.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model, PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families.text import TextDecoderFamily
from cald_speech.mixers import AttentionWeights
from cald_speech.ops import valid_frames


class GPT2Family(TextDecoderFamily):
    """All sizes, DistilGPT-2, and others that say ``gpt2`` in their config, without cross-attention."""

    model_type = "gpt2"
    config_class = GPT2Config
    model_classes = (GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification)
    leftover_names = (r"h\.\d+\.attn\.(bias|masked_bias)$",)
    slot_name = "attn"
    cache_argument = "past_key_values"
    mask_at = 2  # behind the cache
    norm_name = "ln_f"
    layers_name = "h"
    first_norm_name = "ln_1"

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        if model.config.add_cross_attention:
            raise UserError(
                "add_cross_attention: expected a model of text alone, got one that its config makes the decoder of an "
                "encoder. Load it with add_cross_attention: false"
            )
        return super().prepare(model)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = y + x
        return x + layer.mlp(layer.ln_2(x))

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        config = model.base_model.config
        mask = None if lengths is None else valid_frames(lengths, x.size(1))
        positions = torch.arange(x.size(1), device=x.device)[None]
        options = {"config": config, "inputs_embeds": x, "attention_mask": mask, "past_key_values": None}
        return {"attention_mask": self.masks(config, options | {"position_ids": positions})}

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        """The fused projection's columns are all of q, then all of k, then all of v."""
        attention, heads = self.attention(layer), model.config.num_attention_heads
        fused, output = attention.c_attn, attention.c_proj
        weights = fused.weight.t().unflatten(0, (3, heads, -1))
        biases = fused.bias.unflatten(0, (3, heads, -1))
        return AttentionWeights(*weights, output.weight.t().unflatten(1, (heads, -1)), *biases, output.bias)


FAMILY = GPT2Family()
