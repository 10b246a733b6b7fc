"""BERT (Devlin et al., arXiv 1810.04805)."""

from typing import ClassVar

from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from cald_speech.families.encoder import EncoderFamily


class BertFamily(EncoderFamily):
    """Base and large, cased and uncased."""

    model_type = "bert"
    config_class = BertConfig
    classes: ClassVar = {
        "base": BertModel,
        "masked_lm": BertForMaskedLM,
        "classification": BertForSequenceClassification,
    }
    masked_lm_head = "cls"


FAMILY = BertFamily()
