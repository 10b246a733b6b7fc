"""One label for a sentence, or for a pair of them (floor F5)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cald_speech.data.tables import Sentences, TokenisedTable
from cald_speech.tasks.classification import Classification
from cald_speech.tasks.processors import check_positions, check_vocabulary, tokenizer_of


class TextClassification(Classification):
    """The family's own classifier of text, RoBERTa's over the first token; measured in the percentage of wrong labels.

    Sets are tables (`cald_speech.data.tables`), processors tokenizers. Text is read as it stands: there is nothing to
    normalise, and no character that a tokenizer cannot write.

    Arguments
    ---------
    labels : the names of the classes, in the order of the head's outputs.
    max_tokens : of an input, special tokens counted. What is longer is cut, and counted in the log.

    Example
    -------
    >>> task = TextClassification(["negative", "positive"])
    >>> task.score({"0": ("positive", "positive"), "1": ("negative", "positive")})
    50.0
    """

    modality = Sentences()

    def __init__(self, labels: Sequence[str], max_tokens: int = 512):
        super().__init__(labels)
        self.max_tokens = max_tokens

    def processor(
        self, places: Sequence[str], required: str | None, folder: Path, train: Path, normaliser: str
    ) -> PreTrainedTokenizerBase:
        return tokenizer_of(places, required)

    def dataset(
        self, manifest: Path, processor: PreTrainedTokenizerBase, *, normaliser: str, unknown: str
    ) -> TokenisedTable:
        return TokenisedTable(manifest, processor, self.places, max_tokens=self.max_tokens)

    def head_options(self, start: str, config: PretrainedConfig, processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The model must know the same labels, every token, and as many positions as an input may have."""
        check_vocabulary(start, config, processor)
        check_positions(start, config, self.max_tokens)
        return super().head_options(start, config, processor)
