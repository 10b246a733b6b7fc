"""Qwen3 (Yang et al., arXiv 2505.09388): Qwen2's layers without biases, with a norm over each head's queries and keys.

Converted models are CaldQwen3Model, CaldQwen3ForCausalLM and CaldQwen3ForSequenceClassification, which
conversion/classes.py makes.
"""

from dataclasses import replace

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)

from cald_speech.families.qwen2 import Qwen2Family
from cald_speech.mixers import AttentionWeights


class Qwen3Family(Qwen2Family):
    """Dense models of all sizes."""

    model_type = "qwen3"
    config_class = Qwen3Config
    model_classes = (Qwen3Model, Qwen3ForCausalLM, Qwen3ForSequenceClassification)

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        """The norms of queries and keys have no place here. Their weights go into the rows, as if all rows were normed.

        A row of the projection gives a normed input values of the row's size: so much is divided out.
        """
        attention, weights = self.attention(layer), super().attention_weights(model, layer)
        q, k = (
            _normed(rows, norm.weight) for rows, norm in ((weights.q, attention.q_norm), (weights.k, attention.k_norm))
        )
        return replace(weights, q=q, k=k)


def _normed(rows: Tensor, weight: Tensor) -> Tensor:
    """(H, d, D) to the same, each head of mean square row size 1, times the norm's weight (d,)."""
    size = rows.square().sum(-1, keepdim=True).mean(1, keepdim=True).sqrt()
    return rows / size.clamp(min=1e-6) * weight[:, None]


FAMILY = Qwen3Family()
