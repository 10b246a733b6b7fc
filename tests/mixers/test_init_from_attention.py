"""Mixers started from attention weights: q to C, k to B, v to x, o to the output projection, where they have them."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from cald_speech.mixers import (
    AttentionWeights,
    Bidirectional,
    GatedDeltaNet,
    GatedLinearAttention,
    Hydra,
    Linformer,
    Mamba,
    Mamba2,
    NormalisedLinearAttention,
    WindowedAttention,
)
from cald_speech.ops import gated_delta
from tests.helpers import TOLERANCE, padded_batch, relative_error

WIDTH, HEADS, HEAD_DIM = 32, 4, 8
PROJECTED = {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"}
ATTENTION = {f"{name}_proj.{kind}" for name in ("q", "k", "v", "out") for kind in ("weight", "bias")}
# What of the attention's has a place, and under which names.
STARTS = {
    "Mamba2": (Mamba2, PROJECTED),
    "GatedLinearAttention": (GatedLinearAttention, PROJECTED),
    "GatedDeltaNet": (GatedDeltaNet, PROJECTED),
    "Hydra": (Hydra, PROJECTED),
    "Mamba": (Mamba, PROJECTED),
    "Linformer": (Linformer, ATTENTION),
    "WindowedAttention": (WindowedAttention, ATTENTION),
    "NormalisedLinearAttention": (NormalisedLinearAttention, ATTENTION),
    "Bidirectional Mamba": (
        partial(Bidirectional, mixer=Mamba, share_projections=True),
        {f"forwards.{name}" for name in PROJECTED},
    ),
}


def attention(*, key_heads=HEADS, biases=True) -> AttentionWeights:
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g) / 4  # noqa: E731
    heads = {"q": HEADS, "k": key_heads, "v": key_heads}
    weights = {name: draw(count, HEAD_DIM, WIDTH) for name, count in heads.items()} | {
        "o": draw(WIDTH, HEADS, HEAD_DIM)
    }
    if biases:
        weights |= {f"{name}_bias": draw(count, HEAD_DIM) for name, count in heads.items()} | {"o_bias": draw(WIDTH)}
    return AttentionWeights(**weights)


def rows(mixer: Mamba2) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight and bias of the input projection by what they make."""
    sizes = (WIDTH, WIDTH, WIDTH, WIDTH, HEADS)
    weights = mixer.in_proj.weight.split(sizes)
    biases = (None,) * 5 if mixer.in_proj.bias is None else mixer.in_proj.bias.split(sizes)
    return dict(zip(("gate", "x", "B", "C", "dt"), zip(weights, biases, strict=True), strict=True))


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("key_heads", [HEADS, 2, 1], ids=["a key per head", "grouped keys", "one key"])
def test_copied_rows_are_the_attentions(key_heads, biases):
    weights, mixer = attention(key_heads=key_heads, biases=biases), Mamba2(WIDTH, HEADS)
    named = mixer.init_from_attention(weights)
    assert named == {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"}
    repeats, scale = HEADS // key_heads, HEAD_DIM**-0.5
    for name, w, bias, factor in (
        ("C", weights.q, weights.q_bias, scale),
        ("B", weights.k.repeat_interleave(repeats, 0), weights.k_bias, 1.0),
        ("x", weights.v.repeat_interleave(repeats, 0), weights.v_bias, 1.0),
    ):
        weight, own_bias = rows(mixer)[name]
        assert torch.equal(weight, w.reshape(WIDTH, WIDTH) * factor), name
        if bias is None:
            assert not own_bias.any(), name
        else:
            assert torch.equal(own_bias, bias.repeat_interleave(HEADS // len(bias), 0).flatten() * factor), name
    assert torch.equal(mixer.out_proj.weight, weights.o.reshape(WIDTH, WIDTH))
    assert torch.equal(mixer.out_proj.bias, weights.o_bias if biases else torch.zeros(WIDTH))


@pytest.mark.parametrize(("factory", "names"), STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("key_heads", [HEADS, 2], ids=["a key per head", "grouped keys"])
def test_a_start_names_what_it_fills_and_works(factory, names, key_heads, biases):
    weights, mixer = attention(key_heads=key_heads, biases=biases), factory(WIDTH, HEADS)
    assert mixer.init_from_attention(weights) == names <= dict(mixer.named_parameters()).keys()
    state = mixer.state_dict()
    (out,) = (value for name, value in state.items() if name.endswith("out_proj.weight"))
    assert torch.equal(out, weights.o.reshape(WIDTH, WIDTH))
    y = mixer(*padded_batch((20, 7), WIDTH))
    y.square().sum().backward()
    assert y.isfinite().all() and y[1, :7].abs().sum(-1).all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("mixer_class", [GatedLinearAttention, Hydra])
def test_others_have_mamba2s_rows(mixer_class):
    weights, mixer, like = attention(), mixer_class(WIDTH, HEADS), Mamba2(WIDTH, HEADS)
    for started in (mixer, like):
        started.init_from_attention(weights)
    copied = slice(WIDTH, 4 * WIDTH)  # behind the gate: x, B, C
    assert torch.equal(mixer.in_proj.weight[copied], like.in_proj.weight[copied])
    assert torch.equal(mixer.in_proj.bias[: 4 * WIDTH], like.in_proj.bias[: 4 * WIDTH])
    assert not mixer.in_proj.bias[4 * WIDTH :].any()


def test_mamba_takes_values_and_outputs():
    """With the convolution passing, an open gate and no state, what is left is o silu(v): D alone lets x through."""
    weights, mixer = attention(), Mamba(WIDTH, HEADS)
    mixer.init_from_attention(weights)
    with torch.no_grad():
        mixer.in_proj.weight[WIDTH:].zero_()  # the gate's
        mixer.scan.x_proj.weight.zero_()  # B and C
        x, _ = padded_batch((20,), WIDTH)
        v = x @ weights.v.reshape(WIDTH, WIDTH).T + weights.v_bias.flatten()
        expected = F.silu(v) @ weights.o.reshape(WIDTH, WIDTH).T + weights.o_bias
        assert relative_error(mixer(x), expected) <= TOLERANCE["parity"]


@pytest.mark.parametrize("mixer_class", [Linformer, WindowedAttention])
def test_attention_stays_attention(mixer_class):
    weights, mixer = attention(key_heads=2), mixer_class(WIDTH, HEADS)
    mixer.init_from_attention(weights)
    assert torch.equal(mixer.q_proj.weight, weights.q.reshape(WIDTH, WIDTH))
    assert torch.equal(mixer.k_proj.weight, weights.k.repeat_interleave(2, 0).reshape(WIDTH, WIDTH))
    assert torch.equal(mixer.v_proj.bias, weights.v_bias.repeat_interleave(2, 0).flatten())
    assert torch.equal(mixer.out_proj.bias, weights.o_bias)


@pytest.mark.parametrize("options", [{}, {"per_channel": True, "negative_eigenvalues": True}], ids=str)
def test_gated_delta_net_is_linear_attention_that_is_hardly_corrected(options):
    """Of unit keys and queries; what a frame adds to each head is a tenth of its value, less what is there already."""
    weights, mixer = attention(), GatedDeltaNet(WIDTH, HEADS, **options)
    mixer.init_from_attention(weights)
    with torch.no_grad():
        mixer.in_proj.weight[4 * WIDTH :].zero_()  # those of write strengths and decays
        x, _ = padded_batch((20,), WIDTH)
        gate = mixer.project(x).gate
        q, k, v = (torch.einsum("btm,hdm->bthd", x, getattr(weights, n)) + getattr(weights, f"{n}_bias") for n in "qkv")
        steps = F.softplus(mixer.scan.dt_bias).view(HEADS, -1)  # one for each channel, or for all
        g = (-steps * mixer.scan.A_log.exp()[:, None]).squeeze(-1)
        unit = lambda v: v / v.norm(dim=-1, keepdim=True)  # noqa: E731
        heads = gated_delta(
            unit(q), unit(k), v, torch.full((1, 20, HEADS), 0.1), g.expand(1, 20, *g.shape), backend="naive"
        )
        normed = F.rms_norm(heads, (HEAD_DIM,), eps=1e-5).flatten(-2)
        size = 0.5 * weights.v.reshape(WIDTH, WIDTH).norm(dim=-1)
        expected = (normed * size * F.silu(gate)) @ weights.o.reshape(WIDTH, WIDTH).T + weights.o_bias
        assert relative_error(mixer(x), expected) <= TOLERANCE["parity"]


def test_gated_linear_attention_is_decayed_linear_attention_with_a_norm_a_head():
    weights, mixer = attention(), GatedLinearAttention(WIDTH, HEADS, A_range=(1.0, 4.0), dt_range=(0.01, 0.5))
    mixer.init_from_attention(weights)
    with torch.no_grad():
        mixer.in_proj.weight[4 * WIDTH :].zero_()  # the step sizes'
        x, _ = padded_batch((20,), WIDTH)
        gate = mixer.project(x).gate
        q, k, v = (
            torch.einsum("btm,hdm->bhtd", x, getattr(weights, n)) + getattr(weights, f"{n}_bias")[:, None]
            for n in "qkv"
        )
        dt, A = F.softplus(mixer.scan.dt_bias), -mixer.scan.A_log.exp()
        age = torch.arange(20)[:, None] - torch.arange(20)
        decay = ((dt * A)[:, None, None] * age).exp().where(age >= 0, 0.0) * dt[:, None, None]
        heads = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5 * decay) @ v
        normed = F.rms_norm(heads, (HEAD_DIM,), eps=1e-5).transpose(1, 2).flatten(-2)
        size = 0.5 * weights.v.reshape(WIDTH, WIDTH).norm(dim=-1)
        expected = (normed * size * F.silu(gate)) @ weights.o.reshape(WIDTH, WIDTH).T + weights.o_bias
        assert relative_error(mixer(x), expected) <= TOLERANCE["parity"]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_scan_is_decayed_linear_attention(reverse):
    weights, mixer = attention(), Mamba2(WIDTH, HEADS, activation="identity", A_range=(1.0, 4.0), dt_range=(0.01, 0.5))
    mixer.init_from_attention(weights)
    with torch.no_grad():  # the parts that attention does not have
        rows(mixer)["gate"][0].zero_()
        rows(mixer)["dt"][0].zero_()
        mixer.scan.D.zero_()
        x, _ = padded_batch((20, 20), WIDTH)
        q, k, v = (
            torch.einsum("btm,hdm->bhtd", x, getattr(weights, n)) + getattr(weights, f"{n}_bias")[:, None]
            for n in "qkv"
        )
        dt, A = F.softplus(mixer.scan.dt_bias), -mixer.scan.A_log.exp()
        age = torch.arange(20)[:, None] - torch.arange(20)
        age = -age if reverse else age
        decay = ((dt * A)[:, None, None] * age).exp().where(age >= 0, 0.0) * dt[:, None, None]
        heads = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5 * decay) @ v
        # The norm starts at half the size that values of a normed input have, which is that of their rows of W_v.
        size = 0.5 * weights.v.reshape(WIDTH, WIDTH).square().sum(-1).sqrt()
        normed = F.rms_norm(heads.transpose(1, 2).flatten(-2), (WIDTH,), eps=1e-5) * size
        expected = normed @ weights.o.reshape(WIDTH, WIDTH).T + weights.o_bias
        assert relative_error(mixer(x, reverse=reverse), expected) <= TOLERANCE["parity"]


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_both_directions_start_from_the_attention(shared):
    weights = attention()
    mixer = Bidirectional(WIDTH, HEADS, share_projections=shared)
    named = mixer.init_from_attention(weights)
    parts = [mixer.forwards] if shared else [mixer.forwards, mixer.backwards]
    prefixes = ["forwards"] if shared else ["forwards", "backwards"]
    assert named == {
        f"{p}.{n}.{kind}" for p in prefixes for n in ("in_proj", "out_proj") for kind in ("weight", "bias")
    }
    for part in parts:
        assert torch.equal(rows(part)["B"][0], weights.k.reshape(WIDTH, WIDTH))
    summed = sum(part.out_proj.bias for part in parts)
    assert relative_error(summed, weights.o_bias) <= TOLERANCE["rounding"]
    for scan in (mixer.forwards.scan, mixer.backward_scan if shared else mixer.backwards.scan):
        assert torch.equal(scan.conv1d.weight[..., -1], torch.ones_like(scan.conv1d.weight[..., -1]))
        assert not scan.conv1d.weight[..., :-1].any() and not scan.conv1d.bias.any()


@pytest.mark.parametrize(
    "wrap", [Mamba2, partial(Bidirectional, share_projections=True)], ids=["Mamba2", "Bidirectional"]
)
@pytest.mark.parametrize(
    "options",
    [{"head_dim": 16}, {"d_state": 16}, {"n_groups": 1}, {"expand": 2}],
    ids=lambda options: next(iter(options)),
)
def test_a_geometry_that_does_not_fit_is_named(wrap, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        wrap(WIDTH, HEADS, **options).init_from_attention(attention())


@pytest.mark.parametrize(
    ("factory", "message"),
    [(partial(Mamba, expand=2), r"inner width of the attention, 32: got 64\. Leave expand at 1")]
    + [(partial(cls, d_state=16), "d_state 16") for cls in (GatedLinearAttention, Hydra)],
    ids=["Mamba", "GatedLinearAttention", "Hydra"],
)
def test_another_geometry_that_does_not_fit_is_named(factory, message):
    with pytest.raises(ValueError, match=message):
        factory(WIDTH, HEADS).init_from_attention(attention())


def test_other_heads_are_named():
    with pytest.raises(ValueError, match="4 heads of size 8: got 2 of 16"):
        WindowedAttention(WIDTH, 2).init_from_attention(attention())


@pytest.mark.parametrize("mixer_class", [Mamba2, Mamba, GatedLinearAttention, Hydra, Linformer, WindowedAttention])
def test_a_bias_with_no_place_is_named(mixer_class):
    with pytest.raises(ValueError, match="bias: True"):
        mixer_class(WIDTH, HEADS, bias=False).init_from_attention(attention())


def test_attention_without_biases_needs_none():
    weights, mixer = attention(biases=False), WindowedAttention(WIDTH, HEADS, bias=False)
    assert mixer.init_from_attention(weights) == {name for name in ATTENTION if name.endswith("weight")}
