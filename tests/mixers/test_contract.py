"""What every mixer promises. A new class exported by cald_speech.mixers is found here by itself."""

import copy
import json
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cald_speech import mixers
from cald_speech.mixers import (
    Bidirectional,
    CausalMixer,
    GatedDeltaNet,
    GatedLinearAttention,
    Hydra,
    Linformer,
    Mamba,
    Mamba2,
    Mixer,
    NormalisedLinearAttention,
    WindowedAttention,
    describe_factory,
    factory_from,
    scan,
)
from cald_speech.mixers.scan import Scan
from tests.helpers import TOLERANCE, flip_valid, gradients, padded_batch, relative_error, worst_gradient

WIDTH, HEADS = 32, 4
LENGTHS = (17, 9, 0, 4)


def is_concrete(cls) -> bool:
    """A class that can be built: not Mixer or CausalMixer themselves."""
    if not (isinstance(cls, type) and issubclass(cls, Mixer)):
        return False
    return cls.project is not CausalMixer.project if issubclass(cls, CausalMixer) else cls.forward is not Mixer.forward


def mixer_class(factory) -> type[Mixer]:
    return factory.func if isinstance(factory, partial) else factory


PAPER = {"head_dim": 8, "d_state": 16, "n_groups": 1, "bias": False}
FADING = {"A_range": (0.1, 1.0)}  # so fast that the two directions differ over some frames
FACTORIES = {name: cls for name, cls in vars(mixers).items() if is_concrete(cls)} | {
    "Mamba2 paper": partial(Mamba2, **PAPER),
    "Mamba2 expanded": partial(Mamba2, expand=2, n_groups=2, d_conv=3, chunk_size=4),
    "Mamba2 without convolution": partial(Mamba2, d_conv=0),
    "Bidirectional paper": partial(Bidirectional, mixer=Mamba2, **PAPER),
    "Bidirectional shared": partial(Bidirectional, share_projections=True),
    "Bidirectional shared without convolution": partial(Bidirectional, share_projections=True, d_conv=0),
    "Bidirectional shared paper": partial(Bidirectional, share_projections=True, **PAPER),
    "Mamba of CALD's Pythia": partial(Mamba, expand=2.5, bias=False),
    "Mamba narrow": partial(Mamba, d_state=3, dt_rank=1, d_conv=2, chunk_size=4),
    "Bidirectional Mamba": partial(Bidirectional, mixer=Mamba, expand=2),
    "Bidirectional shared Mamba": partial(Bidirectional, mixer=Mamba, share_projections=True),
    "Gated linear attention grouped": partial(GatedLinearAttention, n_groups=2, d_state=4, expand=2, bias=False),
    "Bidirectional gated linear attention": partial(Bidirectional, mixer=GatedLinearAttention),
    "Bidirectional shared gated linear attention": partial(
        Bidirectional, mixer=GatedLinearAttention, share_projections=True
    ),
    "Gated DeltaNet of the paper": partial(
        GatedDeltaNet, d_conv=4, activation="silu", d_state=16, n_groups=2, bias=False
    ),
    "Gated DeltaNet per channel": partial(
        GatedDeltaNet, per_channel=True, decay_rank=3, negative_eigenvalues=True, activation="silu", chunk_size=4
    ),
    "Bidirectional shared gated DeltaNet per channel": partial(
        Bidirectional, mixer=GatedDeltaNet, share_projections=True, per_channel=True
    ),
    "Hydra paper": partial(Hydra, **PAPER),
    "Hydra expanded": partial(Hydra, expand=2, n_groups=2, chunk_size=4),
    "Normalised linear attention, window": partial(NormalisedLinearAttention, window=3, **FADING),
    "Bidirectional normalised": partial(Bidirectional, mixer=NormalisedLinearAttention),
    "Bidirectional shared normalised": partial(
        Bidirectional, mixer=NormalisedLinearAttention, share_projections=True, **FADING
    ),
    "Bidirectional shared normalised, window": partial(
        Bidirectional, mixer=NormalisedLinearAttention, share_projections=True, window=3, **FADING
    ),
    "Linformer kv": partial(Linformer, k=5, max_length=300, sharing="kv", bias=False),
    "Linformer layer": partial(Linformer, k=5, max_length=300, sharing="layer"),
    "Windowed attention narrow": partial(WindowedAttention, window=3, bias=False),
    "Windowed attention with distance keys": partial(WindowedAttention, window=7, distance_keys=True),
    "Windowed attention with a position bias": partial(WindowedAttention, window=7, position_bias=True),
}
CAUSAL = {name: factory for name, factory in FACTORIES.items() if issubclass(mixer_class(factory), CausalMixer)}
SCANNING = {
    name: factory
    for name, factory in FACTORIES.items()
    if any(isinstance(module, Scan) for module in factory(WIDTH, HEADS).modules())
}
BOTH_WAYS = {name: factory for name, factory in FACTORIES.items() if mixer_class(factory) is Bidirectional}

every_mixer = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
every_scanning_mixer = pytest.mark.parametrize("factory", SCANNING.values(), ids=SCANNING)
every_causal_mixer = pytest.mark.parametrize("factory", CAUSAL.values(), ids=CAUSAL)
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def build(factory, seed=0) -> Mixer:
    torch.manual_seed(seed)
    return factory(WIDTH, HEADS)


def in_float32(mixer: Mixer) -> dict[str, torch.Tensor]:
    """The parameters that must keep float32, whatever is done to the mixer."""
    return {n: p for n, p in mixer.named_parameters() if n.rpartition(".")[-1] in ("A_log", "dt_bias", "D")}


def test_the_exported_mixers_are_found():
    exported = {
        "Bidirectional",
        "GatedDeltaNet",
        "GatedLinearAttention",
        "Hydra",
        "Linformer",
        "Mamba",
        "Mamba2",
        "NormalisedLinearAttention",
        "WindowedAttention",
    }
    assert exported <= FACTORIES.keys()
    assert {"Mamba", "Mamba2", "GatedDeltaNet", "GatedLinearAttention"} <= CAUSAL.keys()
    assert {*CAUSAL, *BOTH_WAYS, "Hydra"} <= SCANNING.keys()


@every_mixer
def test_shape_and_zeros_at_padding(factory):
    mixer = build(factory)
    x, lengths = padded_batch(LENGTHS, WIDTH)
    y = mixer(x, lengths)
    assert y.shape == x.shape
    for row, length in enumerate(LENGTHS):
        assert y[row, :length].abs().sum(-1).all() and not y[row, length:].any()
    assert mixer(x).shape == x.shape


@pytest.mark.parametrize("name", ["Bidirectional", "GatedDeltaNet", "GatedLinearAttention", "Hydra", "Mamba", "Mamba2"])
def test_shapes_alone(name):
    """Under FakeTensorMode, with which memory is reckoned before any is taken."""
    mixer, mode = build(FACTORIES[name]), FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        y = mixer(*map(mode.from_tensor, (torch.ones(2, 3, WIDTH), torch.tensor([3, 1]))))
    assert y.shape == (2, 3, WIDTH)


@every_mixer
def test_alone_equals_padded_in_outputs_and_gradients(factory):
    mixer = build(factory)
    x, lengths = padded_batch(LENGTHS, WIDTH)
    x.requires_grad_()
    weights = torch.randn_like(x)
    y = mixer(x, lengths)
    (y * weights).sum().backward()
    batched, x_grad = gradients(mixer), x.grad
    mixer.zero_grad()
    for row, length in enumerate(LENGTHS):
        if length == 0:
            continue
        single = x[row : row + 1, :length].detach().requires_grad_()
        alone = mixer(single)
        assert relative_error(alone[0], y[row, :length]) <= TOLERANCE["rounding"]
        (alone * weights[row, :length]).sum().backward()
        assert relative_error(single.grad[0], x_grad[row, :length]) <= TOLERANCE["rounding"]
        assert not x_grad[row, length:].any()
    error, name = worst_gradient(gradients(mixer), batched)
    assert error <= TOLERANCE["rounding"], name


@every_mixer
def test_batch_order_does_not_matter(factory):
    mixer = build(factory)
    x, lengths = padded_batch(LENGTHS, WIDTH)
    order = torch.tensor([2, 0, 3, 1])
    assert relative_error(mixer(x[order], lengths[order]), mixer(x, lengths)[order]) <= TOLERANCE["rounding"]


@every_mixer
def test_what_stands_at_padding_does_not_matter(factory):
    mixer = build(factory)
    x, lengths = padded_batch(LENGTHS, WIDTH)
    other = x.clone()
    for row, length in enumerate(LENGTHS):
        other[row, length:] = 1e4
    assert torch.equal(mixer(other, lengths), mixer(x, lengths))


@every_mixer
def test_gradients_are_finite_and_reach_every_parameter(factory):
    mixer = build(factory)
    x, lengths = padded_batch((300, 1, 0), WIDTH)
    mixer(x, lengths).square().sum().backward()
    got = gradients(mixer)
    assert got.keys() == dict(mixer.named_parameters()).keys()
    assert [name for name, g in got.items() if not (g.isfinite().all() and g.any())] == []


CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).float(),
    "double": lambda m: m.double(),
    "copy of bfloat16": lambda m: copy.deepcopy(m.to(torch.bfloat16)),
}


@every_mixer
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_decays_and_step_sizes_stay_in_float32(factory, cast):
    mixer = build(factory)
    before = {name: p.detach().clone() for name, p in in_float32(mixer).items()}
    after = in_float32(cast(mixer))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == torch.float32 and torch.equal(after[name], value), name
        assert isinstance(after[name], torch.nn.Parameter) and after[name].requires_grad


@every_mixer
def test_gradients_take_the_dtype_of_their_parameters_when_cast(factory):
    mixer = build(factory)
    mixer(*padded_batch(LENGTHS, WIDTH)).sum().backward()
    mixer.to(torch.bfloat16)
    assert [name for name, p in mixer.named_parameters() if p.grad.dtype != p.dtype] == []


@every_mixer
def test_bfloat16_is_finite_and_near(factory):
    mixer = build(factory)
    x, lengths = padded_batch((200, 9), WIDTH)
    expected = mixer(x, lengths)
    mixer.to(torch.bfloat16)
    y = mixer(x.bfloat16(), lengths)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) <= TOLERANCE["bfloat16 layer"]
    assert all(g.isfinite().all() for g in gradients(mixer).values())


@every_mixer
def test_autocast_is_finite_and_near(factory):
    mixer = build(factory)
    x, lengths = padded_batch((200, 9), WIDTH)
    expected = mixer(x, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x, lengths)
    y.float().square().sum().backward()
    assert relative_error(y, expected) <= TOLERANCE["bfloat16 layer"]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(mixer).values())


@every_mixer
def test_state_dict_round_trip(factory):
    mixer, other = build(factory), build(factory, seed=1)
    x, lengths = padded_batch(LENGTHS, WIDTH)
    assert not torch.equal(other(x, lengths), mixer(x, lengths))
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x, lengths), mixer(x, lengths))


@every_mixer
def test_factory_round_trip_through_json(factory):
    description = json.loads(json.dumps(describe_factory(factory)))
    again = factory_from(description)
    assert describe_factory(again) == description
    x, lengths = padded_batch(LENGTHS, WIDTH)
    assert torch.equal(build(again)(x, lengths), build(factory)(x, lengths))


@every_scanning_mixer
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_backend_is_an_option_and_does_not_matter(factory, backend):
    x, lengths = padded_batch(LENGTHS, WIDTH)
    y = build(partial(factory, backend=backend))(x, lengths)
    assert relative_error(y, build(factory)(x, lengths)) <= TOLERANCE["parity"]


@every_mixer
def test_inference_in_blocks_equals_training_at_once(factory, monkeypatch):
    monkeypatch.setattr(scan, "FRAMES_AT_ONCE", 64)
    mixer = build(factory)
    x, lengths = padded_batch((200, 131, 64, 0), WIDTH)
    expected = mixer(x, lengths)
    with torch.no_grad():
        assert relative_error(mixer(x, lengths), expected) <= TOLERANCE["rounding"]
        assert relative_error(mixer(x[:1]), expected[:1]) <= TOLERANCE["rounding"]


@every_mixer
@pytest.mark.parametrize("sizes", [(5, 1, 17), (23,)], ids=["5+1+17", "whole"])
def test_sweeps_in_pieces_equal_the_whole(factory, sizes):
    """What long audio goes through: each sweep in its order, over what the one before left."""
    mixer = build(factory)
    x, _ = padded_batch((23,), WIDTH)
    partial = None
    for sweep in mixer.sweeps():
        pieces = (23,) if sweep.whole else sizes
        left = [None] * len(pieces) if partial is None else partial.split(pieces, 1)
        inputs = list(zip(x.split(pieces, 1), left, strict=True))
        outputs, state = [], None
        for piece, before in reversed(inputs) if sweep.reverse else inputs:
            out, state = sweep.step(piece, before, state)
            outputs.append(out)
        partial = torch.cat(outputs[::-1] if sweep.reverse else outputs, dim=1)
    assert relative_error(partial, mixer(x)) <= TOLERANCE["rounding"]


@every_causal_mixer
@directions
def test_blocks_carry_the_state(factory, reverse, monkeypatch):
    monkeypatch.setattr(scan, "FRAMES_AT_ONCE", 64)
    mixer = build(factory)
    x, lengths = padded_batch((200, 131), WIDTH)
    _, state = mixer(x, lengths, return_state=True)
    expected = mixer(x, lengths, state=state, reverse=reverse)
    with torch.no_grad():
        y = mixer(x, lengths, state=state, reverse=reverse)
    assert relative_error(y, expected) <= TOLERANCE["rounding"]


@every_causal_mixer
@directions
def test_no_look_ahead(factory, reverse):
    """Changing what the scan has not seen yet changes nothing; what it has seen, it remembers."""
    mixer = build(factory)
    x, _ = padded_batch((20,), WIDTH)
    changed = x.clone()
    changed[:, 8] += 1.0
    y, other = mixer(x, reverse=reverse), mixer(changed, reverse=reverse)
    unseen, seen = (slice(9, 20), slice(0, 9)) if reverse else (slice(0, 8), slice(8, 20))
    assert torch.equal(y[:, unseen], other[:, unseen])
    assert (y[:, seen] - other[:, seen]).abs().sum(-1).all()


@every_causal_mixer
@directions
@pytest.mark.parametrize("sizes", [(5, 1, 17), (1,) * 23, (20, 3)], ids=["5+1+17", "frame by frame", "20+3"])
def test_pieces_equal_the_whole(factory, reverse, sizes):
    mixer = build(factory)
    x, lengths = padded_batch((23, 13, 0, 1), WIDTH)
    expected = mixer(x, lengths, reverse=reverse)
    starts = torch.tensor((0, *sizes)).cumsum(0)
    pieces = [
        (piece, (lengths - start).clamp(0, size))
        for piece, start, size in zip(x.split(sizes, 1), starts, sizes, strict=False)
    ]
    outputs, state = [], None
    for piece, valid in reversed(pieces) if reverse else pieces:
        y, state = mixer(piece, valid, state=state, return_state=True, reverse=reverse)
        outputs.append(y)
    assert relative_error(torch.cat(outputs[::-1] if reverse else outputs, dim=1), expected) <= TOLERANCE["rounding"]


@every_causal_mixer
def test_reverse_is_flipping_within_valid_frames(factory):
    mixer = build(factory)
    x, lengths = padded_batch(LENGTHS, WIDTH)
    expected = flip_valid(mixer(flip_valid(x, lengths), lengths), lengths)
    assert relative_error(mixer(x, lengths, reverse=True), expected) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("factory", BOTH_WAYS.values(), ids=BOTH_WAYS)
class TestBidirectional:
    def test_sees_both_directions(self, factory):
        mixer = build(factory)
        x, _ = padded_batch((20,), WIDTH)
        changed = x.clone()
        changed[:, 8] += 1.0
        assert (mixer(x) - mixer(changed)).abs().sum(-1).all()

    def test_swapped_directions_on_flipped_input(self, factory):
        mixer = build(factory)
        parts = (
            (mixer.forwards.scan, mixer.backward_scan) if mixer.share_projections else (mixer.forwards, mixer.backwards)
        )
        x, lengths = padded_batch(LENGTHS, WIDTH)
        expected = flip_valid(mixer(x, lengths), lengths)
        assert relative_error(mixer(flip_valid(x, lengths), lengths), expected) > 0.01  # the directions differ
        states = [copy.deepcopy(part.state_dict()) for part in parts]
        for part, state in zip(parts, reversed(states), strict=True):
            part.load_state_dict(state)
        assert relative_error(mixer(flip_valid(x, lengths), lengths), expected) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("options", [{"head_dim": 5}, {"n_groups": 3}], ids=["head_dim", "n_groups"])
def test_sizes_that_do_not_divide_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Mamba2(WIDTH, HEADS, **options)


@pytest.mark.parametrize(
    "factory",
    [
        lambda width, heads: Mamba2(width, heads),
        torch.nn.Linear,
        partial(Mamba2, 32),
        partial(torch.nn.Linear, bias=True),
    ],
    ids=["function", "another module", "positional arguments", "partial of another module"],
)
def test_what_is_no_factory_is_refused(factory):
    with pytest.raises(ValueError, match="expected a Mixer class or a partial"):
        describe_factory(factory)


def test_an_unknown_mixer_is_named():
    with pytest.raises(ValueError, match=r"mixer 'Mamba9' is not known: expected one of Bidirectional, .*Mamba2"):
        factory_from({"mixer": "Mamba9", "arguments": {}})
