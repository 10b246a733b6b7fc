"""Language modelling: the next token from those before it, or masked tokens from those around them (floor F5)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cald_speech.data.batching import BatchChange, item_lengths
from cald_speech.data.tokens import UNLABELLED, MaskedBlocks, Masking, TokenBlocks, Tokens, TokenSet
from cald_speech.errors import UserError
from cald_speech.tasks.base import Task
from cald_speech.tasks.processors import check_vocabulary, tokenizer_of


class LanguageModelling(Task):
    """What both kinds share: token sets, a loss summed over predicted tokens, measured in perplexity."""

    metric = "perplexity"
    unit = ""
    modality = Tokens()
    unread = ("normaliser", "unknown_characters")

    def processor(
        self, places: Sequence[str], required: str | None, folder: Path, train: Path, normaliser: str
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of the model, which must be the one that made the tokens."""
        own = TokenSet.read(train).tokenizer
        found = tokenizer_of(places if own is None else (*places, own), required)
        if own is not None:
            made = tokenizer_of((), own)
            if made.get_vocab() != found.get_vocab():
                raise UserError(
                    f"the tokens of {train} are those of the tokenizer in {own}, of {len(made)} tokens, and the model "
                    f"has another, of {len(found)}: expected the same vocabulary. Prepare the data with the model's "
                    "own (tokenizer in `corpus`), or give --processor"
                )
        return found

    def dataset(self, manifest: Path, processor: PreTrainedTokenizerBase, *, normaliser: str, unknown: str) -> Dataset:
        return TokenBlocks(TokenSet.read(manifest))

    def head_options(self, start: str, config: PretrainedConfig, processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Embeddings may be more than the vocabulary (Pythia's are a multiple of 128), and never fewer."""
        check_vocabulary(start, config, processor)
        return {}

    def targets(self, batch: PaddedBatch) -> Tensor:
        """(B, T) the token that each place is to predict, or UNLABELLED."""
        raise NotImplementedError(f"{type(self).__name__} has no targets()")

    def units(self, batch: PaddedBatch) -> Tensor:
        return (self.targets(batch) != UNLABELLED).sum(-1)

    def loss(self, outputs: Tensor, lengths: Tensor, batch: PaddedBatch) -> Tensor:
        """The summed cross-entropy in nats, in float32, of outputs (B, T, V)."""
        return self._losses(outputs, batch).sum()

    def _losses(self, outputs: Tensor, batch: PaddedBatch) -> Tensor:
        """(B, T), zero where nothing is predicted."""
        targets = self.targets(batch).to(outputs.device)
        options = {"ignore_index": UNLABELLED, "reduction": "none"}
        return F.cross_entropy(outputs.float().flatten(0, 1), targets.flatten(), **options).view_as(targets)

    def results(
        self,
        outputs: Tensor,
        followed: None,
        lengths: Tensor,
        batch: PaddedBatch,
        processor: PreTrainedTokenizerBase,
    ) -> Sequence[tuple[float, int]]:
        """(nats, predicted tokens) of each item."""
        return list(zip(self._losses(outputs, batch).sum(-1).tolist(), self.units(batch).tolist(), strict=True))

    def score(self, results: Mapping[str, tuple[float, int]]) -> float:
        nats, count = (sum(of_kind) for of_kind in zip(*results.values(), strict=True))
        return math.exp(min(nats / max(1, count), 700.0))  # more would overflow


class CausalLM(LanguageModelling):
    """Every token from those before it.

    Example
    -------
    >>> batch = PaddedBatch([{"id": "0", "tokens": torch.tensor([5, 6, 7])}])
    >>> CausalLM().targets(batch).tolist(), CausalLM().units(batch).tolist()
    ([[6, 7, -100]], [2])
    """

    head = "lm"

    def targets(self, batch: PaddedBatch) -> Tensor:
        tokens, lengths = batch.tokens.data, item_lengths(batch.tokens)
        shifted = F.pad(tokens[:, 1:], (0, 1), value=UNLABELLED)
        behind = torch.arange(tokens.size(1)) >= lengths[:, None] - 1
        return shifted.masked_fill(behind, UNLABELLED)


class MaskedLM(LanguageModelling):
    """Masked tokens from those around them (Devlin et al., arXiv 1810.04805). Of the ``share`` that is chosen, 80 %
    become the mask token, 10 % another token, and 10 % stay.

    Training draws them anew for each batch (Liu et al., arXiv 1907.11692), validation for each block once and for all.
    """

    head = "masked_lm"

    def __init__(self, share: float = 0.15):
        if not 0 < share < 1:
            raise ValueError(f"share: expected more than 0 and less than 1, got {share}")
        self.share = share

    def dataset(self, manifest: Path, processor: PreTrainedTokenizerBase, *, normaliser: str, unknown: str) -> Dataset:
        plain = super().dataset(manifest, processor, normaliser=normaliser, unknown=unknown)
        return MaskedBlocks(plain.set, Masking.of(processor, self.share))

    def change(self, processor: PreTrainedTokenizerBase, *, join_utterances: int, pause_s: float) -> BatchChange | None:
        super().change(processor, join_utterances=join_utterances, pause_s=pause_s)
        masking = Masking.of(processor, self.share)
        return lambda items, seed: [
            item | masking(item["plain"], seed=seed + place) for place, item in enumerate(items)
        ]

    def targets(self, batch: PaddedBatch) -> Tensor:
        beyond = torch.arange(batch.labels.data.size(1)) >= item_lengths(batch.labels)[:, None]
        return batch.labels.data.masked_fill(beyond, UNLABELLED)
