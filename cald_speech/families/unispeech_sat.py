"""UniSpeech-SAT (Chen et al., arXiv 2110.05752): UniSpeech, pretrained to tell speakers apart.

Converted models are CaldUniSpeechSatModel, CaldUniSpeechSatForCTC and CaldUniSpeechSatForSequenceClassification, which
conversion/classes.py makes.
"""

from transformers import (
    UniSpeechSatConfig,
    UniSpeechSatForCTC,
    UniSpeechSatForSequenceClassification,
    UniSpeechSatModel,
)
from transformers.models.unispeech_sat.modeling_unispeech_sat import UniSpeechSatEncoderLayerStableLayerNorm

from cald_speech.families.speech import SpeechFamily


class UniSpeechSatFamily(SpeechFamily):
    """Base (post-norm, GroupNorm front end) and large (pre-norm, LayerNorm front end), any depth and width."""

    model_type = "unispeech-sat"
    config_class = UniSpeechSatConfig
    model_classes = (UniSpeechSatModel, UniSpeechSatForCTC, UniSpeechSatForSequenceClassification)
    pre_norm_layer = UniSpeechSatEncoderLayerStableLayerNorm
    # What the contrastive loss over speakers and the clusters' projection leave in the files.
    leftover_names = (
        *SpeechFamily.leftover_names,
        r"speaker_proj\.",
        "label_embeddings_concat",
        r"layer_norm_for_extract\.",
    )


FAMILY = UniSpeechSatFamily()
