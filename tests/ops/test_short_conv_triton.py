"""The Triton kernels of the short convolution, in Triton's interpreter where there is no GPU: they equal naive.

The tiles are made small for it, so that short sequences have several; their real sizes are compiled for a GPU in
``test_compiled_kernels.py``.
"""

import pytest
import torch

from cald_speech.ops import short_conv
from cald_speech.ops.short_conv import triton
from tests.helpers import TOLERANCE, flip_valid, relative_error
from tests.ops.test_short_conv import CHANNELS, DIRECTIONS, assert_same, make_inputs, run_with_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def set_tiles(monkeypatch, frames, channels, tiles):
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(triton, name, {"BLOCK_T": frames, "BLOCK_D": channels, "num_warps": 1})
    monkeypatch.setattr(triton, "BACKWARD_TILES", tiles)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter's time goes with the number of tiles, whatever their size."""
    set_tiles(monkeypatch, frames=16, channels=8, tiles=1)


def on_device(inputs):
    return {name: v.to(DEVICE) for name, v in inputs.items()}


def run(inputs, *, lengths=None, **options):
    """Output, state and gradients of the kernels, on the CPU again."""
    lengths = None if lengths is None else lengths.to(DEVICE)
    result = run_with_gradients(on_device(inputs), lengths=lengths, backend="triton", **options)
    return {name: v.detach().cpu() for name, v in result.items()}


@DIRECTIONS
@pytest.mark.parametrize("lengths", [None, (18, 9, 0)], ids=["full", "with lengths"])
@pytest.mark.parametrize("num_frames", [1, 18])
def test_equals_naive(num_frames, lengths, reverse):
    inputs = make_inputs(num_frames)
    lengths = None if lengths is None else torch.tensor(lengths).clamp(max=num_frames)
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    assert_same(run(inputs, lengths=lengths, reverse=reverse), expected)


@DIRECTIONS
def test_tiles_smaller_than_the_filter_equal_naive(reverse, monkeypatch):
    """Several programs of several tiles, and several blocks of channels, the last of each only partly filled."""
    set_tiles(monkeypatch, frames=2, channels=4, tiles=2)
    inputs, lengths = make_inputs(7, batch=2), torch.tensor([7, 3])
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    assert_same(run(inputs, lengths=lengths, reverse=reverse), expected)


@DIRECTIONS
@pytest.mark.parametrize(
    ("taps", "activation", "left_out"),
    [(2, "identity", ()), (5, "silu", ("bias",)), (3, "silu", ("initial_state",))],
)
def test_equals_naive_with_options(taps, activation, left_out, reverse):
    inputs = {name: v for name, v in make_inputs(12, taps=taps).items() if name not in left_out}
    options = {"lengths": torch.tensor([12, 2, 0]), "activation": activation, "reverse": reverse}
    assert_same(run(inputs, **options), run_with_gradients(inputs, backend="naive", **options))


@DIRECTIONS
def test_one_tap_has_no_past(reverse):
    inputs = {name: v for name, v in make_inputs(12, taps=1).items() if name != "initial_state"}
    expected = run_with_gradients(inputs, backend="torch", reverse=reverse)
    assert_same(run(inputs, reverse=reverse), expected)


def test_float16_inputs():
    halves = {name: v.half() for name, v in make_inputs(21).items()}
    expected = run_with_gradients({name: v.float() for name, v in halves.items()}, backend="naive")
    result = run(halves)
    assert all(v.dtype == torch.float16 for v in result.values())
    assert_same(result, expected, TOLERANCE["float16"])


@DIRECTIONS
def test_padding_is_never_read(reverse):
    inputs, lengths = make_inputs(13), torch.tensor([13, 2, 0])
    poisoned = inputs | {"x": inputs["x"].clone()}
    poisoned["x"][1, 2:] = poisoned["x"][2] = torch.nan
    clean = run(inputs, lengths=lengths, reverse=reverse)
    result = run(poisoned, lengths=lengths, reverse=reverse)
    assert [name for name in clean if not torch.equal(result[name], clean[name])] == []
    for name in ("y", "gradient of x"):
        assert not result[name][1, 2:].any() and not result[name][2].any(), name
    assert torch.equal(result["state"][2], inputs["initial_state"][2])


def test_the_output_s_gradient_at_padding_is_never_read():
    inputs = {name: v.requires_grad_() for name, v in on_device(make_inputs(9)).items()}
    grad = torch.randn(3, 9, CHANNELS, device=DEVICE)
    grad[1, 7:] = grad[2] = torch.nan
    short_conv(**inputs, lengths=torch.tensor([9, 7, 0], device=DEVICE), backend="triton").backward(grad)
    assert all(torch.isfinite(v.grad).all() for v in inputs.values())


def test_reverse_is_flipping_within_valid_frames():
    inputs, lengths = make_inputs(13), torch.tensor([13, 5, 1])
    flipped = inputs | {"x": flip_valid(inputs["x"], lengths)}
    actual, expected = run(inputs, lengths=lengths, reverse=True), run(flipped, lengths=lengths)
    assert relative_error(actual["y"], flip_valid(expected["y"], lengths)) <= TOLERANCE["rounding"]
    assert torch.equal(actual["state"], expected["state"])


@DIRECTIONS
@pytest.mark.parametrize("cut", [1, 10])
def test_pieces_equal_the_whole(cut, reverse):
    inputs, lengths = on_device(make_inputs(13)), torch.tensor([13, 11, 0], device=DEVICE)
    options = {"reverse": reverse, "return_final_state": True, "backend": "triton"}
    expected, expected_state = short_conv(**inputs, lengths=lengths, **options)
    pieces = [(slice(0, cut), lengths.clamp(max=cut)), (slice(cut, 13), (lengths - cut).clamp(min=0))]
    outputs, state = [], inputs["initial_state"]
    for frames, valid in reversed(pieces) if reverse else pieces:
        piece = inputs | {"x": inputs["x"][:, frames], "initial_state": state}
        y, state = short_conv(**piece, lengths=valid, **options)
        outputs.append(y)
    assert relative_error(torch.cat(outputs[::-1] if reverse else outputs, dim=1), expected) <= TOLERANCE["rounding"]
    assert torch.equal(state, expected_state)


@DIRECTIONS
def test_strided_inputs_and_twice_the_same(reverse):
    inputs = make_inputs(13)
    wide = torch.full((3, 13, 2 * CHANNELS + 3), torch.nan)
    wide[..., 2:-1:2] = inputs["x"]
    strided = {name: v.transpose(0, -1).contiguous().transpose(0, -1) for name, v in inputs.items()}
    expected = run(inputs, reverse=reverse)
    for again in (run(strided | {"x": wide[..., 2:-1:2]}, reverse=reverse), run(inputs, reverse=reverse)):
        assert [name for name in expected if not torch.equal(again[name], expected[name])] == []


@DIRECTIONS
def test_no_frames(reverse):
    inputs = make_inputs(0)
    result = run(inputs, reverse=reverse)
    assert result["y"].shape == (3, 0, CHANNELS) and torch.equal(result["state"], inputs["initial_state"])
    assert result["gradient of initial_state"].any() and not result["gradient of weight"].any()


def test_offsets_past_2_31_elements():
    """Two frames 2^31 elements apart, and channels in the second half of them; only the touched pages exist."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x, grad = (far.as_strided((1, 2, 4), (1, 2**31, 3), start).requires_grad_() for start in (0, 20))
    values = torch.randn(2, 2, 4, device=DEVICE).half()
    with torch.no_grad():
        x[0], grad[0] = values[0], values[1]
    weight = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    y = short_conv(x, weight, backend="triton")
    actual = torch.autograd.grad(y, (x, weight), grad.detach())
    near = values[:1].clone().requires_grad_()
    expected_y = short_conv(near, weight, backend="naive")
    expected = torch.autograd.grad(expected_y, (near, weight), values[1:])
    assert relative_error(y.detach(), expected_y.detach()) <= TOLERANCE["float16"]
    assert all(relative_error(a, e) <= TOLERANCE["float16"] for a, e in zip(actual, expected, strict=True))


def test_more_taps_than_it_can_are_refused_by_name():
    with pytest.raises(ValueError, match=r"go to 16 taps, got 17: pass backend='torch'"):
        short_conv(**on_device(make_inputs(4, taps=17)), backend="triton")


def test_warmup_runs_every_direction():
    triton.warmup(8, dtype=torch.float16, device=DEVICE, padded=(False, True))
