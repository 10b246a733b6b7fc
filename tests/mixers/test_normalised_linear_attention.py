"""Normalised linear attention against its formula with every weight written out, and against the attention it replaces.

What every mixer promises is in test_contract.py.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from cald_speech.mixers import Bidirectional, NormalisedLinearAttention
from cald_speech.ops import mask_padding
from tests.helpers import TOLERANCE, gradients, padded_batch, relative_error
from tests.mixers.test_init_from_attention import HEAD_DIM, HEADS, WIDTH, attention

BOTH = partial(Bidirectional, mixer=NormalisedLinearAttention, share_projections=True)
LENGTHS = (17, 9, 1)


def written_out(mixer: NormalisedLinearAttention, x: torch.Tensor, backward_scan=None) -> torch.Tensor:
    """One sequence (1, T, D), by a (T, T) matrix of weights; in both directions with a second scan."""
    q, k, v = (
        proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    query, key = (
        torch.cat([z, -z], -1).softmax(-1)
        for z in (
            torch.einsum("bhtd,hfd->bhtf", q, mixer.query_map),
            torch.einsum("bhtd,hfd->bhtf", k, mixer.key_map),
        )
    )
    steps = F.softplus(mixer.step_proj(x)).transpose(1, 2)  # (1, H, T)
    time = torch.arange(x.size(1))
    age, window = time[:, None] - time, mixer.scan.window
    weights = torch.zeros(1, HEADS, x.size(1), x.size(1))
    for scan, sign in ((mixer.scan, 1), (backward_scan, -1)):
        if scan is None:
            continue
        rate, gone = scan.A_log.exp()[:, None], steps.cumsum(-1)
        # What has faded between s and t: with a window, in as many frames as went by in the state.
        if sign > 0:
            now = gone.roll(window + 1, -1) if window else gone
            faded = now[..., :, None] - gone[..., None, :]
        else:
            before = gone - steps
            now = before.roll(-window - 1, -1) if window else before
            faded = before[..., None, :] - now[..., :, None]
        far = (query @ key.transpose(-1, -2)) * torch.exp(-rate[..., None] * faded.clamp(min=0)) * steps[..., None, :]
        if window:
            far = far * 2 * HEAD_DIM * scan.gain_log.exp()[:, None, None]
            weights = weights + far.where(sign * age > window, 0.0)
        else:
            weights = weights + far.where(age >= 0 if sign > 0 else age < 0, 0.0)
    if window:
        near = (age >= 0) & (age <= window) if backward_scan is None else age.abs() <= window
        weights = weights + (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).exp().where(near, 0.0)
    y = weights / weights.sum(-1, keepdim=True) @ v
    return mixer.out_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("both", [False, True], ids=["causal", "both directions"])
def test_it_is_its_formula(window, both):
    """So no frame counts twice, and no padding."""
    torch.manual_seed(0)
    mixer = (BOTH if both else NormalisedLinearAttention)(WIDTH, HEADS, window=window, A_range=(0.05, 0.5))
    part = mixer.forwards if both else mixer
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        part.step_proj.weight.mul_(5)
        x, lengths = padded_batch(LENGTHS, WIDTH)
        y = mixer(x, lengths)
        for row, length in enumerate(LENGTHS):
            expected = written_out(part, x[row : row + 1, :length], mixer.backward_scan if both else None)
            assert relative_error(y[row, :length], expected[0]) <= TOLERANCE["parity"]


@pytest.mark.parametrize("both", [False, True], ids=["causal", "both directions"])
def test_a_window_as_long_as_the_input_is_the_attention(both):
    weights = attention()
    mixer = (BOTH if both else NormalisedLinearAttention)(WIDTH, HEADS, window=30)
    mixer.init_from_attention(weights)
    x, _ = padded_batch((20,), WIDTH)
    q, k, v = (
        torch.einsum("btm,hdm->bhtd", x, getattr(weights, n)) + getattr(weights, f"{n}_bias")[:, None] for n in "qkv"
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=not both).transpose(1, 2).flatten(2)
    expected = y @ weights.o.reshape(WIDTH, WIDTH).T + weights.o_bias
    assert relative_error(mixer(x), expected) <= TOLERANCE["parity"]


def test_a_start_follows_the_attentions_scores():
    """Where scores are small, its weights are attention's to first order: less than half of their spread is lost."""
    weights, mixer = attention(biases=False), BOTH(WIDTH, HEADS, A_range=(1e-4, 1e-4))
    mixer.init_from_attention(weights)
    x = 0.5 * padded_batch((200,), WIDTH)[0]
    q, k, v = (torch.einsum("btm,hdm->bhtd", x, getattr(weights, n)) for n in "qkv")
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = attended @ weights.o.reshape(WIDTH, WIDTH).T
    error = (mixer(x) - expected).square().sum() / (expected - expected.mean(1, keepdim=True)).square().sum()
    assert error < 0.5


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_vanish_leave_finite_outputs_and_gradients(window, dtype):
    """Features that have nothing in common, and steps that let everything go."""
    mixer = BOTH(WIDTH, HEADS, window=window).to(dtype)
    with torch.no_grad():
        mixer.forwards.query_map.mul_(300)
        mixer.forwards.key_map.mul_(-300)
        mixer.forwards.step_proj.bias.copy_(torch.tensor([-200.0, -20.0, 20.0, 1e4]))
    x, lengths = padded_batch(LENGTHS, WIDTH)
    y = mixer(x.to(dtype), lengths)
    y.float().square().sum().backward()
    assert y.isfinite().all() and torch.equal(y, mask_padding(y, lengths))
    assert all(gradient.isfinite().all() for gradient in gradients(mixer).values())


def test_a_window_below_zero_is_named():
    with pytest.raises(ValueError, match="window: expected 0 for none"):
        NormalisedLinearAttention(WIDTH, HEADS, window=-1)
