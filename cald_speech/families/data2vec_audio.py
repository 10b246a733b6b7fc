"""data2vec-audio (Baevski et al., arXiv 2202.03555): several positional convolutions, one after the other.

Converted models are CaldData2VecAudioModel, CaldData2VecAudioForCTC and CaldData2VecAudioForSequenceClassification,
which conversion/classes.py makes.
"""

from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    Data2VecAudioForSequenceClassification,
    Data2VecAudioModel,
    PretrainedConfig,
    PreTrainedModel,
)

from cald_speech.families.lengths import AudioLengths
from cald_speech.families.speech import SpeechFamily


class Data2VecAudioFamily(SpeechFamily):
    """Base and large: both post-norm with a LayerNorm front end, any depth and width."""

    model_type = "data2vec-audio"
    config_class = Data2VecAudioConfig
    model_classes = (Data2VecAudioModel, Data2VecAudioForCTC, Data2VecAudioForSequenceClassification)

    def new_lengths(self, base: PreTrainedModel) -> AudioLengths:
        """Lengths, which also keep each positional convolution from what the one before it wrote into the padding.

        Alone, an utterance is followed by zeros there. Hugging Face clears the padding before the first one only.
        """
        context = super().new_lengths(base)
        for layer in base.encoder.pos_conv_embed.layers:
            layer.register_forward_hook(context.silence)
        return context

    def positions_reach(self, config: PretrainedConfig) -> int:
        return config.num_conv_pos_embeddings * (config.conv_pos_kernel_size // 2)


FAMILY = Data2VecAudioFamily()
