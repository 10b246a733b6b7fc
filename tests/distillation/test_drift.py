"""Cosine distances see directions and no padding; the suggestion follows the distance and owns up to its borders."""

import math

import pytest
import torch

from cald_speech.distillation.drift import LARGE, PUBLISHED_ON_SPEECH, SMALL, cosine_distances, suggest
from tests.helpers import padded_batch

LENGTHS = (9, 4, 1)


def states(seed, layers=3):
    return [padded_batch(LENGTHS, 16, seed=10 * seed + i)[0] for i in range(layers)]


def test_padding_does_not_count():
    lengths = torch.tensor(LENGTHS)
    ours, theirs = states(0), states(1)
    for x in ours:
        x[2, 1:] = torch.nan
    sums, frames = cosine_distances(ours, theirs, lengths)
    alone = [
        cosine_distances([x[i : i + 1, :n] for x in ours], [y[i : i + 1, :n] for y in theirs])[0]
        for i, n in enumerate(LENGTHS)
    ]
    assert frames == sum(LENGTHS)
    torch.testing.assert_close(sums, sum(alone))


def test_equal_to_torch_cosine_similarity():
    ours, theirs = states(0), states(1)
    sums, _ = cosine_distances(ours, theirs)
    expected = [(1 - torch.cosine_similarity(x, y, dim=-1)).sum() for x, y in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(sums, torch.stack(expected))


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e-3])
def test_equal_states_and_scaled_ones_are_at_0(scale):
    ours = states(0)
    sums, frames = cosine_distances(ours, [scale * x for x in ours], torch.tensor(LENGTHS))
    assert ((sums >= 0) & (sums / frames < 1e-6)).all()


def test_each_layer_has_its_own():
    ours, theirs = states(0), states(0)
    theirs[1] = -theirs[1]
    sums, frames = cosine_distances(ours, theirs)
    assert (sums / frames).tolist() == pytest.approx([0, 2, 0], abs=1e-6)


def test_unlike_states_are_refused():
    with pytest.raises(ValueError, match="expected the same hidden states"):
        cosine_distances(states(0), states(1, layers=2))


@pytest.mark.parametrize(
    ("distance", "first", "clear"),
    [
        (0.0, "trajectory", True),
        (SMALL, "trajectory", True),
        (SMALL + 1e-6, "target", False),
        (LARGE - 1e-6, "target", False),
        (LARGE, "target", True),
        (PUBLISHED_ON_SPEECH, "target", True),
        (2.0, "target", True),
    ],
)
def test_the_suggestion(distance, first, clear):
    suggestion = suggest(distance)
    assert (suggestion.modes[0], suggestion.clear) == (first, clear)
    assert "our reading" in suggestion.reason and f"{distance:.3f}" in suggestion.reason
    assert ("hybrid" in suggestion.modes) == (distance > SMALL)


@pytest.mark.parametrize("distance", [-0.1, 2.1, math.nan])
def test_what_is_no_distance_is_refused(distance):
    with pytest.raises(ValueError, match="from 0 to 2"):
        suggest(distance)
