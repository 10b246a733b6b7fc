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
from cald_speech.mixers.mamba2 import NEARLY_LINEAR, constant_product
from cald_speech.mixers.scan import Scan
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


def projected(weights: AttentionWeights, x: torch.Tensor) -> list[torch.Tensor]:
    """q / sqrt(d), k and v (B, H, T, d) of a start: q and k with what makes each of their products larger by 1."""
    q, k, v = (
        torch.einsum("btm,hdm->bhtd", x, getattr(weights, n)) + getattr(weights, f"{n}_bias")[:, None] for n in "qkv"
    )
    for_k, for_q = constant_product(weights.k, weights.q * HEAD_DIM**-0.5)
    return [q * HEAD_DIM**-0.5 + for_q[:, None], k + for_k[:, None], v]


def test_products_of_a_start_have_one_more():
    """In a direction in which these keys and queries do not vary at all: q . k is then 1 + what it was."""
    weights = attention(biases=False)
    weights.k[:, -1], weights.q[:, -1] = 0, 0
    x, _ = padded_batch((20,), WIDTH)
    q, k = (torch.einsum("btm,hdm->bhtd", x, w) for w in (weights.q, weights.k))
    for_k, for_q = constant_product(weights.k, weights.q)
    products = (q + for_q[:, None]) @ (k + for_k[:, None]).transpose(-1, -2)
    assert relative_error(products, 1 + q @ k.transpose(-1, -2)) <= TOLERANCE["parity"]


@pytest.mark.parametrize(
    "factory", [Mamba2, GatedLinearAttention, Hydra, GatedDeltaNet, Mamba], ids=lambda mixer: mixer.__name__
)
def test_a_start_adds_nothing_that_attention_had_not(factory):
    """No direct path, one step for all frames, an open gate, a long memory; where ranges are given, those."""
    mixer = factory(WIDTH, HEADS)
    mixer.init_from_attention(attention())
    scans = [module for module in mixer.modules() if isinstance(module, Scan)]
    assert all(scan.D is None or not scan.D.any() for scan in scans)
    x, _ = padded_batch((20,), WIDTH)
    streams, gate = mixer.project(x)
    assert (F.silu(gate) - 1).abs().max() < 1e-4
    for scan in scans:
        if factory is Mamba:
            steps, slowest = scan.step_sizes(streams[0]), scan.A_log.exp().min(-1).values
        else:
            beside = streams[1][..., -HEADS:]  # all alike: they are zeros
            steps, slowest = scan.step_sizes(beside), scan.A_log.exp()
        assert (steps - steps[:, :1]).abs().max() < 1e-6
        assert ((steps * slowest).max() < 0.011) and ((steps * slowest).min() > 0.0019)
    given = factory(WIDTH, HEADS, dt_range=(0.05, 0.05))
    given.init_from_attention(attention())
    kept = [F.softplus(scan.dt_bias) for scan in given.modules() if isinstance(scan, Scan)]
    assert all(torch.allclose(steps, torch.tensor(0.05)) for steps in kept)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("key_heads", [HEADS, 2, 1], ids=["a key per head", "grouped keys", "one key"])
def test_copied_rows_are_the_attentions(key_heads, biases):
    weights, mixer = attention(key_heads=key_heads, biases=biases), Mamba2(WIDTH, HEADS)
    named = mixer.init_from_attention(weights)
    assert named == {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"}
    repeats, scale = HEADS // key_heads, HEAD_DIM**-0.5
    ones = dict(zip("BC", constant_product(weights.expanded().k, weights.q * scale), strict=True))
    for name, w, bias, factor in (
        ("C", weights.q, weights.q_bias, scale),
        ("B", weights.k.repeat_interleave(repeats, 0), weights.k_bias, 1.0),
        ("x", weights.v.repeat_interleave(repeats, 0), weights.v_bias, 1.0),
    ):
        weight, own_bias = rows(mixer)[name]
        assert torch.equal(weight, w.reshape(WIDTH, WIDTH) * factor), name
        expected = (
            torch.zeros(HEADS, HEAD_DIM) if bias is None else bias.repeat_interleave(HEADS // len(bias), 0) * factor
        )
        if name in ones:
            expected = expected + ones[name]
        assert torch.equal(own_bias, expected.flatten()), name
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


def test_mamba_starts_as_a_running_mean_of_values():
    """Weights that are not attention's, but all positive: of these, half of the sum of a mean over a hundred frames."""
    weights, mixer = attention(), Mamba(WIDTH, HEADS)
    mixer.init_from_attention(weights)
    with torch.no_grad():
        x, _ = padded_batch((20,), WIDTH)
        v = F.silu(x @ weights.v.reshape(WIDTH, WIDTH).T + weights.v_bias.flatten())
        _, B, C = mixer.scan.x_proj(v).split(mixer.scan.sizes, dim=-1)
        assert not C[..., 1:].any()
        age = torch.arange(20)[:, None] - torch.arange(20)
        decay = torch.exp(-0.01 * age).where(age >= 0, 0.0) * 0.01
        y = (C[..., :1] @ B[..., :1].transpose(-1, -2) * decay) @ v
        expected = y @ weights.o.reshape(WIDTH, WIDTH).T + weights.o_bias
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
        q, k, v = (frames.transpose(1, 2) for frames in projected(weights, x))
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
        q, k, v = projected(weights, x)
        dt, A = F.softplus(mixer.scan.dt_bias), -mixer.scan.A_log.exp()
        age = torch.arange(20)[:, None] - torch.arange(20)
        decay = ((dt * A)[:, None, None] * age).exp().where(age >= 0, 0.0) * dt[:, None, None]
        heads = (q @ k.transpose(-1, -2) * decay) @ v
        normed = F.rms_norm(heads, (HEAD_DIM,), eps=1e-5).transpose(1, 2).flatten(-2)
        size = 0.5 * weights.v.reshape(WIDTH, WIDTH).norm(dim=-1)
        expected = (normed * size * F.silu(gate)) @ weights.o.reshape(WIDTH, WIDTH).T + weights.o_bias
        assert relative_error(mixer(x), expected) <= TOLERANCE["parity"]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_scan_is_decayed_linear_attention(reverse):
    weights, mixer = attention(), Mamba2(WIDTH, HEADS, activation="identity", A_range=(1.0, 4.0), dt_range=(0.01, 0.5))
    mixer.init_from_attention(weights)
    with torch.no_grad():
        x, _ = padded_batch((20, 20), WIDTH)
        q, k, v = projected(weights, x)
        dt, A = F.softplus(mixer.scan.dt_bias), -mixer.scan.A_log.exp()
        age = torch.arange(20)[:, None] - torch.arange(20)
        age = -age if reverse else age
        decay = ((dt * A)[:, None, None] * age).exp().where(age >= 0, 0.0) * dt[:, None, None]
        heads = (q @ k.transpose(-1, -2) * decay) @ v
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
        assert torch.equal(scan.conv1d.weight[..., -1], torch.full_like(scan.conv1d.weight[..., -1], NEARLY_LINEAR))
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
