"""BERT (Devlin et al., arXiv 1810.04805).

Converted models are CaldBertModel, CaldBertForMaskedLM and CaldBertForSequenceClassification, which
conversion/classes.py makes.
"""

from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from cald_speech.families.text import TextEncoderFamily


class BertFamily(TextEncoderFamily):
    """Base and large, cased and uncased."""

    model_type = "bert"
    config_class = BertConfig
    model_classes = (BertModel, BertForMaskedLM, BertForSequenceClassification)
    masked_lm_head = "cls"


FAMILY = BertFamily()
