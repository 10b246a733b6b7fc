"""XLM-R (Conneau et al., arXiv 1911.02116): RoBERTa's layers, trained on a hundred languages.

Converted models are CaldXLMRobertaModel, CaldXLMRobertaForMaskedLM and CaldXLMRobertaForSequenceClassification, which
conversion/classes.py makes.
"""

from transformers import (
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from cald_speech.families.roberta import RobertaFamily


class XLMRobertaFamily(RobertaFamily):
    """Base and large."""

    model_type = "xlm-roberta"
    config_class = XLMRobertaConfig
    model_classes = (XLMRobertaModel, XLMRobertaForMaskedLM, XLMRobertaForSequenceClassification)


FAMILY = XLMRobertaFamily()
