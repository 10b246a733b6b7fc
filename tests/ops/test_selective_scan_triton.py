"""The Triton kernels of the selective scan, in Triton's interpreter where there is no GPU: they equal naive.

Chunks are made short for it, so that a few frames have several; their real sizes run in one test, and are compiled for
a GPU in ``test_compiled_kernels.py``.
"""

import pytest
import torch

from cald_speech.ops import selective_scan
from cald_speech.ops.selective_scan.triton import launch, warmup
from tests.helpers import TOLERANCE, flip_valid, relative_error
from tests.ops.test_selective_scan import (
    CHANNELS,
    D_STATE,
    DIRECTIONS,
    FRAMEWISE,
    assert_same,
    make_inputs,
    run_with_gradients,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def short_chunks(request, monkeypatch):
    """The interpreter's time goes with the number of frames, padded to whole chunks, and of programs."""
    if "real_sizes" not in request.fixturenames:
        for name in ("UNROLL", "BACKWARD_CHUNK", "CHUNK_SIZE"):
            monkeypatch.setattr(launch, name, 4)
        for name in ("FORWARD_CHANNELS", "BACKWARD_CHANNELS"):
            monkeypatch.setattr(launch, name, 8)


@pytest.fixture
def real_sizes():
    pass


def on_device(inputs):
    return {name: v.to(DEVICE) for name, v in inputs.items()}


def run(inputs, *, lengths=None, **options):
    """Output, state and gradients of the kernels, on the CPU again."""
    lengths = None if lengths is None else lengths.to(DEVICE)
    result = run_with_gradients(on_device(inputs), lengths=lengths, backend="triton", **options)
    return {name: v.detach().cpu() for name, v in result.items()}


@DIRECTIONS
@pytest.mark.parametrize("lengths", [None, (9, 4, 0)], ids=["full", "with lengths"])
def test_equals_naive(lengths, reverse):
    inputs, lengths = make_inputs(9, groups=1), None if lengths is None else torch.tensor(lengths)
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    assert_same(run(inputs, lengths=lengths, reverse=reverse), expected)


@pytest.mark.parametrize("num_frames", [1, 4, 5])
def test_equals_naive_at_borders_of_chunks(num_frames):
    inputs = make_inputs(num_frames, batch=1, groups=1)
    assert_same(run(inputs), run_with_gradients(inputs, backend="naive"))


def test_real_sizes_equal_naive(real_sizes):
    inputs, lengths = make_inputs(18, batch=2, groups=1, channels=5, d_state=3), torch.tensor([18, 7])
    expected = run_with_gradients(inputs, lengths=lengths, reverse=True, backend="naive")
    assert_same(run(inputs, lengths=lengths, reverse=True, chunk_size=8), expected)


@pytest.mark.parametrize("groups", [2, CHANNELS], ids=["two groups", "group per channel"])
@pytest.mark.parametrize("left_out", [(), ("D", "initial_state")], ids=["all", "without D and state"])
def test_equals_naive_with_groups_and_options(groups, left_out):
    inputs = {name: v for name, v in make_inputs(5, batch=1, groups=groups).items() if name not in left_out}
    assert_same(run(inputs, reverse=True), run_with_gradients(inputs, reverse=True, backend="naive"))


@pytest.mark.parametrize("together", [1, 4], ids=["a program each", "one program"])
def test_blocks_of_channels_equal_naive(together, monkeypatch):
    """Three blocks of channels, the last one partly filled, whose gradients of B and C are added up."""
    monkeypatch.setattr(launch, "FORWARD_CHANNELS", 2)
    monkeypatch.setattr(launch, "BACKWARD_CHANNELS", 2)
    monkeypatch.setattr(launch, "blocks_together", lambda *shapes: together)
    inputs = make_inputs(5, batch=2, groups=1, channels=5)
    assert_same(run(inputs), run_with_gradients(inputs, backend="naive"))


def test_blocks_are_taken_together_only_where_programs_are_many():
    assert launch.blocks_together(group_size=1536, block_d=4, programs=10**6) == 32
    assert launch.blocks_together(group_size=1536, block_d=4, programs=3 * launch.ENOUGH_PROGRAMS) == 2
    assert launch.blocks_together(group_size=1536, block_d=4, programs=10) == 1
    assert launch.blocks_together(group_size=3, block_d=4, programs=10**6) == 1


def test_float16_inputs():
    halves = {name: v.half() for name, v in make_inputs(6, batch=2).items() if name != "initial_state"}
    expected = run_with_gradients({name: v.float() for name, v in halves.items()}, backend="naive")
    result = run(halves)
    assert result["y"].dtype == torch.float16 and result["state"].dtype == torch.float32
    assert all(result[f"gradient of {name}"].dtype == torch.float16 for name in halves)
    assert_same(result, expected, TOLERANCE["float16"])


@DIRECTIONS
@pytest.mark.parametrize("strength", [1e-6, 50.0])
def test_decays_from_none_to_total(strength, reverse):
    inputs = make_inputs(10, batch=1, groups=1)
    inputs["dt"], inputs["A"] = torch.rand(inputs["dt"].shape), torch.full((CHANNELS, D_STATE), -strength)
    exact = {name: v.double() for name, v in inputs.items()}
    assert_same(run(inputs, reverse=reverse), run_with_gradients(exact, reverse=reverse, backend="naive"))


def test_gradients_of_total_forgetting_keep_their_size():
    inputs = make_inputs(6, batch=1, groups=1)
    inputs["dt"], inputs["A"] = torch.ones_like(inputs["dt"]), torch.full((CHANNELS, D_STATE), -30.0)
    exact = {name: v.double() for name, v in inputs.items()}
    assert_same(run(inputs), run_with_gradients(exact, backend="naive"))


@DIRECTIONS
def test_padding_is_never_read(reverse):
    inputs, lengths = make_inputs(5, groups=1), torch.tensor([5, 3, 0])
    poisoned = dict(inputs)
    for name in FRAMEWISE:
        poisoned[name] = inputs[name].clone()
        poisoned[name][1, 3:] = poisoned[name][2] = torch.nan
    clean = run(inputs, lengths=lengths, reverse=reverse)
    result = run(poisoned, lengths=lengths, reverse=reverse)
    assert [name for name in clean if not torch.equal(result[name], clean[name])] == []
    for name in ("y", *(f"gradient of {name}" for name in FRAMEWISE)):
        assert not result[name][1, 3:].any() and not result[name][2].any(), name
    assert torch.equal(result["state"][2], inputs["initial_state"][2])


def test_the_output_s_gradient_at_padding_is_never_read():
    inputs = {name: v.requires_grad_() for name, v in on_device(make_inputs(5, groups=1)).items()}
    grad = torch.randn(3, 5, CHANNELS, device=DEVICE)
    grad[1, 2:] = grad[2] = torch.nan
    selective_scan(**inputs, lengths=torch.tensor([5, 2, 0], device=DEVICE), backend="triton").backward(grad)
    assert all(torch.isfinite(v.grad).all() for v in inputs.values())


def test_reverse_is_flipping_within_valid_frames():
    inputs, lengths = make_inputs(7, groups=1), torch.tensor([7, 5, 1])
    flipped = {k: flip_valid(v, lengths) if k in FRAMEWISE else v for k, v in inputs.items()}
    options = {"return_final_state": True, "backend": "triton", "lengths": lengths.to(DEVICE)}
    y, state = selective_scan(**on_device(inputs), **options, reverse=True)
    expected, expected_state = selective_scan(**on_device(flipped), **options)
    assert torch.equal(y.cpu(), flip_valid(expected.cpu(), lengths)) and torch.equal(state, expected_state)


@DIRECTIONS
def test_pieces_equal_the_whole(reverse):
    cut = 3
    inputs, lengths = on_device(make_inputs(11, groups=1)), torch.tensor([11, 7, 0], device=DEVICE)
    options = {"reverse": reverse, "return_final_state": True, "backend": "triton"}
    expected, expected_state = selective_scan(**inputs, lengths=lengths, **options)
    pieces = [(slice(0, cut), lengths.clamp(max=cut)), (slice(cut, 11), (lengths - cut).clamp(min=0))]
    outputs, state = [], inputs["initial_state"]
    for frames, valid in reversed(pieces) if reverse else pieces:
        piece = {k: v[:, frames] if k in FRAMEWISE else v for k, v in inputs.items()}
        y, state = selective_scan(**piece | {"initial_state": state}, lengths=valid, **options)
        outputs.append(y)
    y = torch.cat(outputs[::-1] if reverse else outputs, dim=1)
    assert relative_error(y, expected) <= TOLERANCE["rounding"]
    assert relative_error(state, expected_state) <= TOLERANCE["rounding"]


def test_strided_inputs_and_twice_the_same():
    inputs = make_inputs(5, batch=2, groups=1)
    strided = {name: v.transpose(0, -1).contiguous().transpose(0, -1) for name, v in inputs.items()}
    wide = torch.full((2, 5, 2 * CHANNELS + 3), torch.nan)
    wide[..., 2:-1:2] = inputs["x"]
    expected = run(inputs)
    for again in (run(strided | {"x": wide[..., 2:-1:2]}), run(inputs)):
        assert [name for name in expected if not torch.equal(again[name], expected[name])] == []


@DIRECTIONS
def test_no_frames(reverse):
    inputs = make_inputs(0)
    result = run(inputs, reverse=reverse)
    assert result["y"].shape == (3, 0, CHANNELS) and torch.equal(result["state"], inputs["initial_state"])
    assert result["gradient of initial_state"].any() and not result["gradient of A"].any()


def test_offsets_past_2_31_elements():
    """Every framewise input and the output's gradient with frames 2^30 elements apart; only touched pages exist."""
    far = torch.empty(2**31 + 256, dtype=torch.float16, device=DEVICE)
    halves = {name: v.half() for name, v in make_inputs(3, batch=1, groups=1, channels=4, d_state=2).items()}
    inputs = on_device({name: v.half() if name in FRAMEWISE else v.float() for name, v in halves.items()})
    grad = torch.randn(1, 3, 4, device=DEVICE).half()
    views = {}
    for number, (name, v) in enumerate({**{k: inputs[k] for k in FRAMEWISE}, "grad": grad}.items()):
        views[name] = far.as_strided(v.shape, (1, 2**30, *((1, 3) if v.dim() == 4 else (3,))), 20 * number)
        views[name].copy_(v)
    grad_far = views.pop("grad")
    results = []
    for values, gradient, backend in ((inputs | views, grad_far, "triton"), (inputs, grad, "naive")):
        leaves = {name: v.detach().requires_grad_() for name, v in values.items()}
        y = selective_scan(**leaves, backend=backend)
        grads = torch.autograd.grad(y, tuple(leaves.values()), gradient)
        results.append({"y": y} | dict(zip(leaves, grads, strict=True)))
    assert_same(*results, TOLERANCE["float16"])


def test_wider_states_than_it_can_are_refused_by_name():
    with pytest.raises(ValueError, match=r"go to d_state 256, got 257: pass backend='torch'"):
        selective_scan(**on_device(make_inputs(1, batch=1, d_state=257)), backend="triton")


def test_warmup_runs_every_direction():
    warmup(4, 4, dtype=torch.float16, device=DEVICE)
