"""HuBERT (Hsu et al., arXiv 2106.07447).

Converted models are CaldHubertModel, CaldHubertForCTC and CaldHubertForSequenceClassification, which
conversion/classes.py makes.
"""

from transformers import HubertConfig, HubertForCTC, HubertForSequenceClassification, HubertModel
from transformers.models.hubert.modeling_hubert import HubertEncoderLayerStableLayerNorm

from cald_speech.families.speech import SpeechFamily


class HubertFamily(SpeechFamily):
    """Base (post-norm, GroupNorm front end) and large (pre-norm, LayerNorm front end), any depth and width."""

    model_type = "hubert"
    config_class = HubertConfig
    model_classes = (HubertModel, HubertForCTC, HubertForSequenceClassification)
    pre_norm_layer = HubertEncoderLayerStableLayerNorm


FAMILY = HubertFamily()
