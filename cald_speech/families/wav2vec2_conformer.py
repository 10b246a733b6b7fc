"""wav2vec2-conformer (fairseq, arXiv 2010.05171): attention between two halves of a feed-forward, and a convolution.

Positions are relative, as in Transformer-XL (arXiv 1901.02860), or rotary (arXiv 2104.09864). A layer's slot is its
``self_attn``; what comes after it has a convolution over some frames on either side.

Converted models are CaldWav2Vec2ConformerModel, CaldWav2Vec2ConformerForCTC and
CaldWav2Vec2ConformerForSequenceClassification, which conversion/classes.py makes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ConformerForSequenceClassification,
    Wav2Vec2ConformerModel,
)
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoderLayer

from cald_speech.families.base import Opened, weights_by_head
from cald_speech.families.front_end import FrontEnd
from cald_speech.families.lengths import AudioLengths, MixerSlot
from cald_speech.families.speech import BlockAttention, SpeechFamily
from cald_speech.mixers import AttentionWeights, DistanceKeys, Mixer


class PretrainedBatchNorm(nn.BatchNorm1d):
    """A batch norm that keeps the statistics of pretraining: those of a batch would count its padding in."""

    def train(self, mode: bool = True) -> "PretrainedBatchNorm":
        return super().train(False)


class NoPositions(nn.Module):
    """What stands where other encoders add the output of a positional convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class ConformerAttention(BlockAttention):
    """Rotary keys are kept turned; relative positions are multiplied out for some queries at once.

    A block of t queries and T keys has t + T - 1 distances.
    """

    ENTRIES = 2**24  # heads x queries x distances; 64 MiB in float32

    def keys_values(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        return self.attention.linear_k(self._turned(x, first)), self.attention.linear_v(x)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        attention = self.attention
        queries = attention.linear_q(self._turned(x, first))
        if attention.position_embeddings_type not in ("relative", "relative_key"):
            return attention.linear_out(self.weigh(queries, keys, values, None))
        size = max(1, self.ENTRIES // (attention.num_heads * keys.size(1)))
        parts = []
        for start in range(0, x.size(1), size):
            part = queries[:, start : start + size]
            bias = self._bias(part, first + start, keys.size(1))
            if attention.position_embeddings_type == "relative":
                part = part + attention.pos_bias_u.flatten()
            parts.append(self.weigh(part, keys, values, bias))
        return attention.linear_out(torch.cat(parts, dim=1))

    def _turned(self, x: Tensor, first: int) -> Tensor:
        if self.attention.position_embeddings_type != "rotary":
            return x
        config = self.attention.config
        size = self.attention.head_size
        rates = config.rotary_embedding_base ** -(torch.arange(0, size, 2, device=x.device).float() / size)
        angles = (torch.arange(first, first + x.size(1), device=x.device)[:, None] * rates).repeat(1, 2)
        turns = torch.stack([angles.cos(), angles.sin()])[:, :, None, None].to(x.dtype)
        return self.attention._apply_rotary_embedding(x, turns)

    def _bias(self, queries: Tensor, first: int, num_keys: int) -> Tensor:
        """What the distance to each key adds to the scores of queries (1, t, D): (1, H, t, T)."""
        attention, count = self.attention, queries.size(1)
        relative = attention.position_embeddings_type == "relative"
        # From the farthest past of the last query to the farthest future of the first; query r has key j in column
        # count - 1 - r + j, so that its row begins one column before that of the query before it.
        distances = torch.arange(first + count - 1, first - num_keys, -1, device=queries.device)
        heads = queries.unflatten(2, (attention.num_heads, -1))
        heads = heads + attention.pos_bias_v if relative else heads
        keys = self.distance_keys(-distances).to(queries.dtype)
        scores = (heads[0].transpose(0, 1) @ keys.transpose(1, 2) * attention.scaling).contiguous()
        width = scores.size(2)
        shape, strides = (attention.num_heads, count, num_keys), (count * width, width - 1, 1)
        return scores.as_strided(shape, strides, scores.storage_offset() + count - 1)[None]

    def distance_keys(self, distances: Tensor) -> Tensor:
        """(R,) frames from query to key to the keys that they have in each head, (H, R, d)."""
        attention = self.attention
        if attention.position_embeddings_type == "relative":
            embedded = attention.linear_pos(self._sines(-distances).to(attention.linear_pos.weight.dtype))
            return embedded.unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
        # A key of its own for each distance up to a farthest on either side, the same in every head.
        left, right = attention.left_max_position_embeddings, attention.right_max_position_embeddings
        keys = attention.distance_embedding(distances.clamp(-left, right) + left)
        return keys.expand(attention.num_heads, *keys.shape)

    def _sines(self, distances: Tensor) -> Tensor:
        """(R,) frames from key to query to their embedding (R, D), sines and cosines in turn."""
        width = self.attention.config.hidden_size
        rates = 10_000.0 ** -(torch.arange(0, width, 2, device=distances.device).float() / width)
        angles = distances[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class Wav2Vec2ConformerFamily(SpeechFamily):
    """Relative and rotary positions, and none; both front-end norms, any depth and width."""

    model_type = "wav2vec2-conformer"
    config_class = Wav2Vec2ConformerConfig
    model_classes = (
        Wav2Vec2ConformerModel,
        Wav2Vec2ConformerForCTC,
        Wav2Vec2ConformerForSequenceClassification,
    )
    pre_norm_layer = Wav2Vec2ConformerEncoderLayer

    def new_lengths(self, base: PreTrainedModel) -> AudioLengths:
        """Lengths, which also keep each layer's convolution from what stands in the padding."""
        context = super().new_lengths(base)
        self.hide_padding(base, context)
        for layer in base.encoder.layers:
            layer.conv_module.batch_norm.__class__ = PretrainedBatchNorm
            layer.conv_module.batch_norm.eval()
        return context

    def hide_padding(self, base: PreTrainedModel, context: AudioLengths) -> None:
        """Let each layer's convolution read zeros in the padding."""
        for layer in base.encoder.layers:
            layer.conv_module.glu.register_forward_hook(context.silence)

    def reach(self, layer: nn.Module) -> int:
        """Frames on either side that a layer's convolution sees."""
        return layer.conv_module.depthwise_conv.kernel_size[0] // 2

    def open(self, layer: nn.Module) -> Opened:
        def halfway(x: Tensor) -> Tensor:
            return layer.ffn1(layer.ffn1_layer_norm(x)) * 0.5 + x

        def slot(x: Tensor, *, lengths: Tensor | None = None, **arguments: Any) -> Tensor:
            if isinstance(layer.self_attn, MixerSlot):
                return layer.self_attn.mixer(x, lengths)
            return layer.self_attn(x, **arguments)[0]

        def after(x: Tensor, y: Tensor) -> Tensor:
            x = layer.self_attn_dropout(y) + halfway(x)
            x = x + layer.conv_module(x)
            return layer.final_layer_norm(layer.ffn2(layer.ffn2_layer_norm(x)) * 0.5 + x)

        return Opened(lambda x: layer.self_attn_layer_norm(halfway(x)), slot, after, self.reach(layer))

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        return layer.self_attn, layer.self_attn

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        embed = model.base_model.encoder.embed_positions
        positions = None if embed is None else embed(x)
        return super().layer_arguments(model, x, lengths) | {"relative_position_embeddings": positions}

    def block_attention(self, model: PreTrainedModel, layer: nn.Module) -> BlockAttention:
        return ConformerAttention(layer.self_attn)

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        attention = self.attention(layer)
        inputs = (attention.linear_q, attention.linear_k, attention.linear_v)
        weights = weights_by_head(*inputs, attention.linear_out, heads=attention.num_heads)
        kind, keys = attention.position_embeddings_type, None
        if kind in ("relative", "relative_key"):
            biases = (attention.pos_bias_u, attention.pos_bias_v) if kind == "relative" else (None, None)
            keys = DistanceKeys(ConformerAttention(attention).distance_keys, *biases)
        return replace(weights, positions=kind, distance_keys=keys)

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        self.layers(model)[index].self_attn = self.slot_class(mixer, self.context(model))

    def front_end(self, model: PreTrainedModel) -> FrontEnd:
        # The positional convolution is in the checkpoints, and nothing calls it.
        return super().front_end(model)._replace(positions=NoPositions(), positions_reach=0)


FAMILY = Wav2Vec2ConformerFamily()
