"""What tasks on tables of sentences share, whatever they learn from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cald_speech.data.tables import Sentences, TokenisedTable
from cald_speech.tasks.base import Task
from cald_speech.tasks.processors import check_positions, check_vocabulary, tokenizer_of


class OfSentences(Task):
    """A task whose sets are tables (`cald_speech.data.tables`) and whose processors are tokenizers; before its kind.

    Text is read as it stands: there is nothing to normalise, and no character that a tokenizer cannot write.
    ``max_tokens`` of an input, special tokens counted; what is longer is cut, and counted in the log. ``places`` are
    the numbers of the labels.
    """

    modality = Sentences()
    max_tokens: int
    places: Mapping[str, int]

    def processor(
        self, places: Sequence[str], required: str | None, folder: Path, train: Path, normaliser: str
    ) -> PreTrainedTokenizerBase:
        return tokenizer_of(places, required)

    def dataset(
        self, manifest: Path, processor: PreTrainedTokenizerBase, *, normaliser: str, unknown: str
    ) -> TokenisedTable:
        return TokenisedTable(manifest, processor, self.places, max_tokens=self.max_tokens)

    def head_options(self, start: str, config: PretrainedConfig, processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The model must know every token, and as many positions as an input may have."""
        check_vocabulary(start, config, processor)
        check_positions(start, config, self.max_tokens)
        return super().head_options(start, config, processor)
