"""wav2vec 2.0 (Baevski et al., arXiv 2006.11477).

Converted models are CaldWav2Vec2Model, CaldWav2Vec2ForCTC and CaldWav2Vec2ForSequenceClassification, which
conversion/classes.py makes.
"""

from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2ForSequenceClassification, Wav2Vec2Model
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2EncoderLayerStableLayerNorm

from cald_speech.families.speech import SpeechFamily


class Wav2Vec2Family(SpeechFamily):
    """Base (post-norm, GroupNorm front end) and large-lv60 (pre-norm, LayerNorm front end), any depth and width."""

    model_type = "wav2vec2"
    config_class = Wav2Vec2Config
    model_classes = (Wav2Vec2Model, Wav2Vec2ForCTC, Wav2Vec2ForSequenceClassification)
    pre_norm_layer = Wav2Vec2EncoderLayerStableLayerNorm


FAMILY = Wav2Vec2Family()
