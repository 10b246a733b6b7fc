"""Where a task's processor comes from."""

from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoFeatureExtractor,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SequenceFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.errors import UserError
from cald_speech.families import TextFamily, family_of
from cald_speech.families.folder import check_processor
from cald_speech.families.hub import check_source, has_vocabulary, load_processor_part


class _AnyExtractor:
    """The class that a folder names, of samples or of features; one of samples where it names none."""

    @staticmethod
    def from_pretrained(place: str, **options: Any) -> SequenceFeatureExtractor:
        try:
            return AutoFeatureExtractor.from_pretrained(place, **options)
        except (OSError, ValueError, KeyError):
            return Wav2Vec2FeatureExtractor.from_pretrained(place, **options)


class SpeechProcessor:
    """The class that a folder names, where it has tokenizer and feature extractor and no language model beside them."""

    @staticmethod
    def from_pretrained(place: str, **options: Any) -> ProcessorMixin:
        """Raises what transformers raises where a part is missing."""
        try:
            found = AutoProcessor.from_pretrained(place, **options)
        except (ImportError, OSError, ValueError, KeyError):
            found = None
        if isinstance(found, ProcessorMixin) and not hasattr(found, "decoder"):
            return found
        return Wav2Vec2Processor.from_pretrained(place, **options)


class _Tokenizer:
    """The tokenizer of a folder that has the files of one."""

    @staticmethod
    def from_pretrained(place: str, **options: Any) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        if not has_vocabulary(tokenizer):
            raise OSError("no vocabulary is beside the model")
        return tokenizer


def first_processor(
    cls: type[SpeechProcessor] | type[_Tokenizer] | type[_AnyExtractor],
    places: Sequence[str],
    required: str | None,
) -> ProcessorMixin | SequenceFeatureExtractor | PreTrainedTokenizerBase | None:
    """``required``'s processor if it is given, else that of the first of ``places`` (folders, hub ids) that has one.

    Raises UserError where a place does not exist, or the required one has no processor of the class.
    """
    for place in places if required is None else (required,):
        check_source(place)
        check_processor(place)
        try:
            return load_processor_part(cls, place)
        except UserError as error:
            # A self-supervised encoder has no tokenizer, which is no fault; a processor that was asked for is needed.
            if place == required:
                raise UserError(f"processor: cannot load one from {place!r}: {error}") from error
    return None


def feature_extractor(places: Sequence[str], required: str | None) -> SequenceFeatureExtractor:
    """The same for a task without text: the first one's feature extractor, or a new one."""
    found = first_processor(_AnyExtractor, places, required)
    return found or Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE, return_attention_mask=True)


def tokenizer_of(places: Sequence[str], required: str | None) -> PreTrainedTokenizerBase:
    """The same for text. Raises UserError where no place has a tokenizer: none can be made of a model's weights."""
    found = first_processor(_Tokenizer, places, required)
    if found is None:
        raise UserError(
            f"expected a tokenizer in one of {', '.join(places) or 'no place'}, got none. Give one with --processor"
        )
    return found


def check_vocabulary(start: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for tokens that a model has no embedding for; it may have more (Pythia's are padded)."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the model of {start!r} has embeddings for {config.vocab_size} tokens, and the tokenizer has "
            f"{len(tokenizer)}: expected at least as many. Give the model's own tokenizer with --processor"
        )


def check_positions(start: str, config: PretrainedConfig, max_tokens: int) -> None:
    """Raise UserError for inputs of more tokens than a model of text has positions for."""
    positions = family_of(config, TextFamily).max_tokens(config)
    if max_tokens > positions:
        raise UserError(
            f"max_tokens: expected at most {positions}, the positions of {start!r}, got {max_tokens}. Give a lower one "
            "with --max_tokens"
        )
