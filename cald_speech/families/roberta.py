"""RoBERTa (Liu et al., arXiv 1907.11692).

Converted models are CaldRobertaModel, CaldRobertaForMaskedLM and CaldRobertaForSequenceClassification, which
conversion/classes.py makes.
"""

from transformers import (
    PretrainedConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from cald_speech.families.text import TextEncoderFamily


class RobertaFamily(TextEncoderFamily):
    """Base and large; CALD converts the base model to Linformer."""

    model_type = "roberta"
    config_class = RobertaConfig
    model_classes = (RobertaModel, RobertaForMaskedLM, RobertaForSequenceClassification)
    masked_lm_head = "lm_head"

    def max_tokens(self, config: PretrainedConfig) -> int:
        # Positions are counted from behind that of padding: 512 of 514.
        return config.max_position_embeddings - config.pad_token_id - 1


FAMILY = RobertaFamily()
