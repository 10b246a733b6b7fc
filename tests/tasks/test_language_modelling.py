"""Causal and masked language modelling: which tokens are predicted, and that padding predicts nothing."""

import math

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch.nn import functional as F

from cald_speech.data.tokens import UNLABELLED
from cald_speech.tasks.language_modelling import CausalLM, MaskedLM

ROWS = [torch.tensor([5, 6, 7, 8]), torch.tensor([1, 2])]


def batch_of(rows, **more):
    return PaddedBatch([{"id": str(i), "tokens": r} | {k: v[i] for k, v in more.items()} for i, r in enumerate(rows)])


def logits_for(rows, vocab=9):
    return torch.randn(len(rows), max(map(len, rows)), vocab, generator=torch.Generator().manual_seed(0))


def test_every_next_token_is_predicted_and_no_padding():
    task, batch, logits = CausalLM(), batch_of(ROWS), logits_for(ROWS)
    assert task.units(batch).tolist() == [3, 1]
    expected = sum(F.cross_entropy(logits[i, : len(r) - 1], r[1:], reduction="sum") for i, r in enumerate(ROWS))
    torch.testing.assert_close(task.loss(logits, torch.tensor([4, 2]), batch), expected)


def test_masked_tokens_alone_are_predicted():
    labels = [torch.tensor([UNLABELLED, 6, UNLABELLED, 3]), torch.tensor([UNLABELLED, 2])]
    task, batch, logits = MaskedLM(), batch_of(ROWS, labels=labels), logits_for(ROWS)
    assert task.units(batch).tolist() == [2, 1]
    expected = -sum(logits[i, p].log_softmax(-1)[t] for i, p, t in ((0, 1, 6), (0, 3, 3), (1, 1, 2)))
    torch.testing.assert_close(task.loss(logits, torch.tensor([4, 2]), batch), expected)


def test_the_metric_is_perplexity_over_tokens():
    task, batch, logits = CausalLM(), batch_of(ROWS), logits_for(ROWS)
    results = task.results(logits, None, torch.tensor([4, 2]), batch, None)
    assert [count for _, count in results] == [3, 1]
    nats = float(task.loss(logits, torch.tensor([4, 2]), batch))
    assert task.score(dict(zip("ab", results, strict=True))) == pytest.approx(math.exp(nats / 4), rel=1e-5)
    assert math.isfinite(task.score({"a": (1e9, 1)}))


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_that_masks_nothing_or_all_is_refused(share):
    with pytest.raises(ValueError, match="share: expected more than 0 and less than 1"):
        MaskedLM(share)
