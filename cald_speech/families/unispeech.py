"""UniSpeech (Wang et al., arXiv 2101.07597).

Converted models are CaldUniSpeechModel, CaldUniSpeechForCTC and CaldUniSpeechForSequenceClassification, which
conversion/classes.py makes.
"""

from transformers import UniSpeechConfig, UniSpeechForCTC, UniSpeechForSequenceClassification, UniSpeechModel
from transformers.models.unispeech.modeling_unispeech import UniSpeechEncoderLayerStableLayerNorm

from cald_speech.families.speech import SpeechFamily


class UniSpeechFamily(SpeechFamily):
    """Base (post-norm, GroupNorm front end) and large (pre-norm, LayerNorm front end), any depth and width."""

    model_type = "unispeech"
    config_class = UniSpeechConfig
    model_classes = (UniSpeechModel, UniSpeechForCTC, UniSpeechForSequenceClassification)
    pre_norm_layer = UniSpeechEncoderLayerStableLayerNorm
    # The multi-task pretraining has a CTC head of phonemes and projects what it compares with the quantised frames.
    leftover_names = (*SpeechFamily.leftover_names, r"ctc_proj\.")


FAMILY = UniSpeechFamily()
