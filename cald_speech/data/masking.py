"""Masked tokens: which are to be predicted, and what stands in their places."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cald_speech.data.tokens import TokenBlocks, TokenSet
from cald_speech.errors import UserError

UNLABELLED = -100  # the label of a token that is not to be predicted


@dataclass(frozen=True)
class Masking:
    """Chooses and masks tokens; the same seed always chooses the same.

    Example
    -------
    >>> masked = Masking(0.5, mask_token=9, vocab_size=9)(torch.arange(8), seed=0)
    >>> chosen = masked["labels"] != UNLABELLED
    >>> torch.equal(masked["labels"][chosen], torch.arange(8)[chosen])
    True
    """

    share: float
    mask_token: int
    vocab_size: int
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, share: float) -> "Masking":
        """Raises UserError for a tokenizer without a mask token."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                "expected a tokenizer with a mask token, for masked language modelling, got one without. Give an "
                "encoder's (RoBERTa, BERT), or train a causal model"
            )
        return cls(share, tokenizer.mask_token_id, len(tokenizer), tuple(sorted(tokenizer.all_special_ids)))

    def __call__(self, tokens: Tensor, *, seed: int) -> dict[str, Tensor]:
        """``tokens`` (T,) masked, and ``labels`` (T,): what was there, UNLABELLED where nothing was chosen."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        draw = lambda: torch.rand(tokens.shape, generator=generator)  # noqa: E731
        chosen = (draw() < self.share) & ~torch.isin(tokens, torch.tensor(self.special, dtype=torch.long))
        fate = draw()
        others = torch.randint(self.vocab_size, tokens.shape, generator=generator)
        masked = torch.where(chosen & (fate < 0.8), self.mask_token, tokens)
        masked = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), others, masked)
        return {"tokens": masked, "labels": tokens.masked_fill(~chosen, UNLABELLED)}


class MaskedBlocks(TokenBlocks):
    """Items {"id", "tokens", "labels", "plain"}: a block masked by its place, and as it was."""

    def __init__(self, tokens: TokenSet, masking: Masking):
        super().__init__(tokens)
        self.masking = masking

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        plain = self.tokens(place)
        return {"id": str(place), "plain": plain} | self.masking(plain, seed=place)
