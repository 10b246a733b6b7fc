"""WavLM (Chen et al., arXiv 2110.13900): attention with a gated relative position bias, shared by all layers.

Converted models are CaldWavLMModel, CaldWavLMForCTC and CaldWavLMForSequenceClassification, which conversion/classes.py
makes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, WavLMConfig, WavLMForCTC, WavLMForSequenceClassification, WavLMModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention, WavLMEncoderLayerStableLayerNorm

from cald_speech.families.lengths import AudioLengths, MixerSlot
from cald_speech.families.speech import BlockAttention, SpeechFamily
from cald_speech.mixers import AttentionWeights, Mixer, PositionBias
from cald_speech.ops import valid_frames


class WavLMMixerSlot(MixerSlot):
    """A slot that hands the position bias on; the first layer's also computes it while a later layer needs it.

    WavLM's encoder lets layer 0 turn its table of biases (``rel_attn_embed``) into a (T, T) bias for each head, which
    all layers use. Where layer 0 is converted, its slot owns the table.
    """

    def __init__(self, mixer: Mixer, context: AudioLengths, bias_source: WavLMAttention | None = None):
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


class GatedBiasAttention(BlockAttention):
    """WavLM's: a bias for each head and each distance, which every query scales by a gate made from its own frame.

    The bias depends on the distance alone, so that 2T - 1 values a head hold all of it; each block of queries
    multiplies its own rows out, at most ``ENTRIES`` of them at once.
    """

    ENTRIES = 2**24  # heads x queries x keys; 64 MiB in float32

    def __init__(self, attention: nn.Module, table: nn.Module):
        """``table``: the attention or slot that owns the embedding of the distances, ``rel_attn_embed``."""
        super().__init__(attention)
        self.table = table
        self.by_distance: Tensor | None = None  # (H, 2T - 1), the most negative distance first

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        num_frames = keys.size(1)
        if self.by_distance is None or self.by_distance.size(1) != 2 * num_frames - 1:
            self.by_distance = self._bias_by_distance(num_frames)
        # Row s of the windows holds the distances -s, ..., T - 1 - s from key to query, in a view: for query i,
        # s = T - 1 - i counts backwards. So the queries are taken from last to first, which spares flipping the rows.
        windows = self.by_distance.unfold(1, num_frames, 1)
        size = max(1, self.ENTRIES // (self.attention.num_heads * num_frames))
        parts = []
        for start in range(0, x.size(1), size):
            part = x[:, start : start + size].flip(1)
            row = num_frames - first - start - part.size(1)
            bias = self._gate(part) * windows[None, :, row : row + part.size(1)]
            parts.append(self.weigh(self.attention.q_proj(part), keys, values, bias).flip(1))
        return self.attention.out_proj(torch.cat(parts, dim=1))

    def _bias_by_distance(self, num_frames: int) -> Tensor:
        weight = self.table.rel_attn_embed.weight
        distances = torch.arange(1 - num_frames, num_frames, device=weight.device)
        return self.table.rel_attn_embed(self.table._relative_positions_bucket(distances)).t().contiguous()

    def _gate(self, x: Tensor) -> Tensor:
        """(1, t, D) to (1, H, t, 1), as in WavLMAttention.forward."""
        heads = x.unflatten(2, (self.attention.num_heads, -1)).transpose(1, 2)
        projected = self.attention.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1)
        gate_a, gate_b = torch.sigmoid(projected).chunk(2, dim=-1)
        return gate_a * (gate_b * self.attention.gru_rel_pos_const - 1.0) + 2.0


class WavLMFamily(SpeechFamily):
    """Base(-plus) (post-norm, GroupNorm front end) and large (pre-norm, LayerNorm front end), any depth and width."""

    model_type = "wavlm"
    config_class = WavLMConfig
    model_classes = (WavLMModel, WavLMForCTC, WavLMForSequenceClassification)
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
