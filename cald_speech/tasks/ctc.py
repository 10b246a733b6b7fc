"""Connectionist temporal classification (Graves et al., 2006): characters without an alignment."""

from collections.abc import Mapping, Sequence

from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from cald_speech.tasks.base import Task
from cald_speech.tasks.decoding import greedy
from cald_speech.tasks.wer import score


class CTC(Task):
    """Speech recognition with a CTC head: summed over characters, decoded greedily, measured in word error rate.

    ``blank`` is the id of the blank label, the padding token of Hugging Face's CTC tokenizers.
    """

    head = "ctc"
    metric = "WER"

    def __init__(self, blank: int = 0):
        self.blank = blank

    def count(self, batch: PaddedBatch) -> int:
        return int(label_lengths(batch).sum())

    def loss(self, logits: Tensor, lengths: Tensor, batch: PaddedBatch) -> Tensor:
        """The summed negative log-likelihood; an utterance with more characters than frames counts as 0.

        In float32 whatever autocast says: a long utterance's likelihood underflows in half precision.
        """
        log_probs = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
        labels = batch.labels.data.to(logits.device)
        targets = label_lengths(batch).to(logits.device)
        return F.ctc_loss(log_probs, labels, lengths, targets, blank=self.blank, reduction="sum", zero_infinity=True)

    def hypotheses(
        self, logits: Tensor, lengths: Tensor, batch: PaddedBatch, tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[str]:
        return greedy(logits, lengths, tokenizer)

    def score(self, references: Mapping[str, str], hypotheses: Mapping[str, str]) -> float:
        rate = score(references, hypotheses).words.rate
        # A validation set without a single word has no error rate; inf never wins against one that has.
        return float("inf") if rate is None else rate


def label_lengths(batch: PaddedBatch) -> Tensor:
    """(B,) characters of each transcript, from SpeechBrain's relative lengths."""
    return (batch.labels.lengths * batch.labels.data.size(1)).round().long()
