"""With projections of its own for each direction, a bidirectional mixer is the sum of its two causal mixers."""

from functools import partial

import pytest
import torch

from cald_speech.mixers import Bidirectional, GatedLinearAttention, Mamba, Mamba2
from cald_speech.mixers.scan import Scan
from tests.helpers import TOLERANCE, gradients, padded_batch, relative_error, worst_gradient

WIDTH, HEADS = 32, 4
LENGTHS = (17, 9, 0, 4)
FACTORIES = {
    "BiMamba2": Bidirectional,
    "BiMamba2 of the paper": partial(Bidirectional, head_dim=8, d_state=16, n_groups=1, bias=False),
    "without convolution": partial(Bidirectional, d_conv=0),
    "gated linear attention": partial(Bidirectional, mixer=GatedLinearAttention),
    "Mamba": partial(Bidirectional, mixer=Mamba),
}
every = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def build(factory):
    torch.manual_seed(0)
    return factory(WIDTH, HEADS)


def with_gradients(mixer, function, x, lengths):
    """The output, and the gradients of parameters and input."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    y = function(x, lengths)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return y.detach(), gradients(mixer) | {"x": x.grad}


@every
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_is_the_sum_of_two_causal_mixers(factory, padded):
    mixer = build(factory)
    x, lengths = padded_batch(LENGTHS, WIDTH)
    lengths = lengths if padded else None

    def two_mixers(x, lengths):
        return mixer.forwards(x, lengths) + mixer.backwards(x, lengths, reverse=True)

    y, found = with_gradients(mixer, mixer, x, lengths)
    expected, wanted = with_gradients(mixer, two_mixers, x, lengths)
    assert relative_error(y, expected) <= TOLERANCE["rounding"]
    error, name = worst_gradient(found, wanted)
    assert error <= TOLERANCE["rounding"], name


@every
def test_scans_beside_each_other_equal_one_after_the_other(factory):
    mixer = build(factory)
    x, lengths = padded_batch(LENGTHS, WIDTH)
    scan, other = mixer.forwards.scan, mixer.backwards.scan
    streams = [part.project(x).scanned for part in (mixer.forwards, mixer.backwards)]
    for y, expected in zip(
        scan.beside(other, *streams, lengths), Scan.beside(scan, other, *streams, lengths), strict=True
    ):
        assert relative_error(y, expected) <= TOLERANCE["rounding"]


def test_mamba2_scans_both_directions_in_one_call(monkeypatch):
    calls = []
    monkeypatch.setattr("cald_speech.mixers.mamba2.ssd_pair", lambda x, *rest, **options: calls.append(options) or x)
    x, lengths = padded_batch(LENGTHS, WIDTH)
    mixer = Bidirectional(WIDTH, HEADS, mixer=partial(Mamba2, chunk_size=4))
    mixer(x, lengths)
    assert calls == [{"lengths": lengths, "chunk_size": 4, "backend": "auto"}]
