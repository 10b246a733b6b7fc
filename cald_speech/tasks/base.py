"""A task: from head output to loss, hypothesis and metric (floor F5)."""

from collections.abc import Mapping, Sequence

from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class Task:
    """What a head is trained for. ``head`` names the family's model class, ``metric`` the figure that is reported.

    Losses are sums; the trainer divides them by ``count`` summed over all ranks and accumulated batches.
    """

    head: str
    metric: str

    def count(self, batch: PaddedBatch) -> int:
        """The number of units (characters, utterances) in the batch that the loss sums over."""
        raise NotImplementedError(f"{type(self).__name__} has no count()")

    def loss(self, logits: Tensor, lengths: Tensor, batch: PaddedBatch) -> Tensor:
        """The loss summed over the batch, a float32 scalar, from logits (B, T, V) and (B,) valid frames."""
        raise NotImplementedError(f"{type(self).__name__} has no loss()")

    def hypotheses(
        self, logits: Tensor, lengths: Tensor, batch: PaddedBatch, tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[str]:
        """What the model says for each utterance of the batch."""
        raise NotImplementedError(f"{type(self).__name__} has no hypotheses()")

    def score(self, references: Mapping[str, str], hypotheses: Mapping[str, str]) -> float:
        """The metric in percent, lower is better."""
        raise NotImplementedError(f"{type(self).__name__} has no score()")
