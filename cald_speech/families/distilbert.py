"""DistilBERT (Sanh et al., arXiv 1910.01108): every second layer of BERT.

Converted models are CaldDistilBertModel, CaldDistilBertForMaskedLM and CaldDistilBertForSequenceClassification, which
conversion/classes.py makes.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
    PreTrainedModel,
)

from cald_speech.families.base import weights_by_head
from cald_speech.families.text import WholeSlotEncoderFamily
from cald_speech.mixers import AttentionWeights


class DistilBertFamily(WholeSlotEncoderFamily):
    """Base, cased, uncased and multilingual."""

    model_type = "distilbert"
    config_class = DistilBertConfig
    model_classes = (DistilBertModel, DistilBertForMaskedLM, DistilBertForSequenceClassification)
    head_names = (r"vocab_", r"pre_classifier\.", r"classifier\.")
    slot_name = "attention"

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.base_model.transformer.layer

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = layer.sa_layer_norm(y + x)
        return layer.output_layer_norm(layer.ffn(x) + x)

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        attention = self.attention(layer)
        inputs = (attention.q_lin, attention.k_lin, attention.v_lin)
        return weights_by_head(*inputs, attention.out_lin, heads=attention.n_heads)

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        self.check_head(model)
        return lambda x: model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(x))))


FAMILY = DistilBertFamily()
