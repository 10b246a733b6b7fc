"""WavLM (Chen et al., arXiv 2110.13900): attention with a gated relative position bias, shared by all layers."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, WavLMConfig, WavLMForCTC, WavLMForSequenceClassification, WavLMModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention, WavLMEncoderLayerStableLayerNorm

from cald_speech.families.block_attention import BlockAttention, GatedBiasAttention
from cald_speech.families.lengths import LengthContext
from cald_speech.families.slot import MixerSlot
from cald_speech.families.speech import SpeechFamily
from cald_speech.mixers import AttentionWeights, Mixer, PositionBias
from cald_speech.ops import valid_frames


class WavLMMixerSlot(MixerSlot):
    """A slot that hands the position bias on; the first layer's also computes it while a later layer needs it.

    WavLM's encoder lets layer 0 turn its table of biases (``rel_attn_embed``) into a (T, T) bias for each head, which
    all layers use. Where layer 0 is converted, its slot owns the table.
    """

    def __init__(self, mixer: Mixer, context: LengthContext, bias_source: WavLMAttention | None = None):
        super().__init__(mixer, context)
        self.rel_attn_embed = None
        if bias_source is not None:
            self.rel_attn_embed = bias_source.rel_attn_embed
            self.num_buckets, self.max_distance = bias_source.num_buckets, bias_source.max_distance

    # The bucketing is WavLM's own.
    compute_bias = WavLMAttention.compute_bias
    _relative_positions_bucket = WavLMAttention._relative_positions_bucket

    def forward(
        self, hidden_states: Tensor, position_bias: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None, Tensor | None]:
        """(B, T, D) to (B, T, D), no attention weights, and the bias (B * heads, T, T) or None."""
        if position_bias is None and self.rel_attn_embed is not None:
            position_bias = expand_bias(self.compute_bias, hidden_states)
        return (*super().forward(hidden_states), position_bias)


def expand_bias(compute_bias, x: Tensor) -> Tensor:
    """The bias of every head for every sequence of ``x`` (B, T, D), as the attention takes it: (B * heads, T, T)."""
    batch, num_frames, _ = x.shape
    bias = compute_bias(num_frames, num_frames)
    return bias.unsqueeze(0).repeat(batch, 1, 1, 1).flatten(0, 1)


class WavLMFamily(SpeechFamily):
    """Base(-plus) (post-norm, GroupNorm front end) and large (pre-norm, LayerNorm front end), any depth and width."""

    model_type = "wavlm"
    config_class = WavLMConfig
    classes: ClassVar = {
        "base": WavLMModel,
        "ctc": WavLMForCTC,
        "classification": WavLMForSequenceClassification,
    }
    pre_norm_layer = WavLMEncoderLayerStableLayerNorm
    slot_class = WavLMMixerSlot

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        first = self.layers(model)[0].attention
        bias = None if first.rel_attn_embed is None else expand_bias(first.compute_bias, x)
        mask = None if lengths is None else valid_frames(lengths, x.size(1))
        return {"attention_mask": mask, "position_bias": bias}

    def block_attention(self, model: PreTrainedModel, layer: nn.Module) -> BlockAttention:
        return GatedBiasAttention(layer.attention, self.layers(model)[0].attention)

    @torch.no_grad()
    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        weights = super().attention_weights(model, layer)
        attention, table = layer.attention, self.layers(model)[0].attention
        reach = torch.arange(-table.max_distance, table.max_distance + 1, device=table.rel_attn_embed.weight.device)
        linear = attention.gru_rel_pos_linear  # eight numbers, of which only two sums of four are used
        bias = PositionBias(
            by_distance=table.rel_attn_embed(table._relative_positions_bucket(reach)).t(),
            gate=linear.weight.unflatten(0, (2, 4)).sum(1),
            gate_bias=linear.bias.unflatten(0, (2, 4)).sum(1),
            scale=attention.gru_rel_pos_const.flatten(),
        )
        return replace(weights, position_bias=bias)

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        layers = self.layers(model)
        old = layers[index].attention
        slot = WavLMMixerSlot(mixer, self.context(model), old if index == 0 else None)
        layers[index].attention = slot
        if all(isinstance(layer.attention, MixerSlot) for layer in layers):
            layers[0].attention.rel_attn_embed = None


FAMILY = WavLMFamily()
