"""The short convolution: the fast paths equal the definition, padding is never read, pieces equal the whole."""

import pytest
import torch

from cald_speech.ops import short_conv
from cald_speech.ops.short_conv import torch_blocked
from tests.helpers import NATIVE, NO_NATIVE, TOLERANCE, flip_valid, relative_error

DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
BACKENDS = pytest.mark.parametrize("backend", ["naive", "torch", NATIVE])
FAST = pytest.mark.parametrize("backend", ["torch", NATIVE])
CHANNELS = 6


def make_inputs(num_frames, *, taps=4, batch=3, channels=CHANNELS, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, num_frames, channels),
        "weight": (channels, taps),
        "bias": (channels,),
        "initial_state": (batch, channels, taps - 1),
    }
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def run_with_gradients(inputs, **options):
    leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
    y, state = short_conv(**leaves, return_final_state=True, **options)
    g = torch.Generator().manual_seed(1)
    weigh = lambda v: (v * torch.randn(v.shape, generator=g)).sum()  # noqa: E731
    (weigh(y) + weigh(state)).backward()
    return {"y": y, "state": state} | {f"gradient of {name}": v.grad for name, v in leaves.items()}


def assert_same(actual, expected, tolerance=TOLERANCE["parity"]):
    errors = {name: relative_error(actual[name].detach(), expected[name].detach()) for name in expected}
    assert all(error <= tolerance for error in errors.values()), errors


@DIRECTIONS
@FAST
@pytest.mark.parametrize("padded", [False, True], ids=["full", "with lengths"])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 65, 300])
def test_fast_equals_naive(num_frames, padded, backend, reverse):
    inputs = make_inputs(num_frames)
    lengths = torch.tensor([num_frames, num_frames // 2, 0]) if padded else None
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    assert_same(run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend=backend), expected)


@DIRECTIONS
@FAST
@pytest.mark.parametrize("activation", ["silu", "identity"])
@pytest.mark.parametrize("left_out", [(), ("bias",), ("initial_state",)], ids=["all", "without bias", "without state"])
@pytest.mark.parametrize("taps", [1, 2, 5])
def test_fast_equals_naive_with_options(taps, left_out, activation, backend, reverse):
    inputs = {name: v for name, v in make_inputs(12, taps=taps).items() if name not in left_out}
    options = {"lengths": torch.tensor([12, 2, 0]), "activation": activation, "reverse": reverse}
    leaves = {k: v for k, v in inputs.items() if v.numel()}
    rest = {k: v for k, v in inputs.items() if not v.numel()}
    expected = short_conv(**leaves, **rest, return_final_state=True, backend="naive", **options)
    actual = short_conv(**leaves, **rest, return_final_state=True, backend=backend, **options)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= TOLERANCE["rounding"]


@DIRECTIONS
@pytest.mark.parametrize("lengths", [(40, 17, 2), (32, 16, 0)], ids=["odd", "whole blocks"])
@pytest.mark.parametrize("taps", [2, 4, 18])
def test_blocks_of_sixteen_frames_equal_naive(taps, lengths, reverse, monkeypatch):
    """Several blocks for each sequence, the last one shorter than the filter, and a filter longer than a block."""
    monkeypatch.setattr(torch_blocked, "BLOCK_ELEMENTS", 1)
    inputs, options = make_inputs(40, taps=taps), {"lengths": torch.tensor(lengths), "reverse": reverse}
    expected = run_with_gradients(inputs, backend="naive", **options)
    assert_same(run_with_gradients(inputs, backend="torch", **options), expected)


@DIRECTIONS
@FAST
def test_slices_of_wider_tensors(backend, reverse):
    """x and the output's gradient as a mixer hands them over: slices of one projection, nothing contiguous."""
    inputs = {name: v.requires_grad_() for name, v in make_inputs(40).items()}
    grad = torch.randn(3, 40, CHANNELS)
    wide, wide_grad = torch.randn(3, 40, CHANNELS + 5), torch.randn(CHANNELS, 40, 3)
    wide[..., 2:-3] = inputs["x"].detach()
    wide_grad.copy_(grad.permute(2, 1, 0))
    expected = short_conv(**inputs, reverse=reverse, backend=backend)
    expected.backward(grad)
    sliced = {name: v.detach().clone().requires_grad_() for name, v in inputs.items()} | {"x": wide[..., 2:-3]}
    sliced["x"].requires_grad_()
    y = short_conv(**sliced, reverse=reverse, backend=backend)
    y.backward(wide_grad.permute(2, 1, 0))
    assert torch.equal(y, expected)
    assert [name for name, v in inputs.items() if not torch.equal(sliced[name].grad, v.grad)] == []


@FAST
def test_the_output_s_gradient_at_padding_is_never_read(backend):
    inputs, lengths = {name: v.requires_grad_() for name, v in make_inputs(20).items()}, torch.tensor([20, 7, 0])
    grad = torch.randn(3, 20, CHANNELS)
    grad[1, 7:] = grad[2] = torch.nan
    short_conv(**inputs, lengths=lengths, backend=backend).backward(grad)
    assert all(torch.isfinite(v.grad).all() for v in inputs.values())


@FAST
@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state"])
def test_only_what_is_asked_for_gets_a_gradient(name, backend):
    inputs = make_inputs(20)
    inputs[name].requires_grad_()
    short_conv(**inputs, backend=backend).sum().backward()
    assert [k for k, v in inputs.items() if v.grad is not None] == [name]


@BACKENDS
def test_is_torchs_depthwise_convolution(backend):
    inputs = make_inputs(30)
    x = torch.cat([inputs["initial_state"], inputs["x"].transpose(1, 2)], dim=-1)
    expected = torch.nn.functional.conv1d(x, inputs["weight"][:, None], inputs["bias"], groups=CHANNELS)
    y = short_conv(**inputs, activation="identity", backend=backend)
    assert relative_error(y, expected.transpose(1, 2)) <= TOLERANCE["rounding"]


@DIRECTIONS
def test_gradients_against_finite_differences(reverse):
    inputs = make_inputs(5, batch=2, dtype=torch.float64)
    lengths = torch.tensor([5, 3])

    def function(*values):
        named = dict(zip(inputs, values, strict=True))
        return short_conv(**named, lengths=lengths, reverse=reverse, return_final_state=True, backend="torch")

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_inputs(dtype, backend):
    halves = {name: v.to(dtype) for name, v in make_inputs(65).items()}
    if backend == "native":
        with pytest.raises(ValueError, match="its arithmetic is float32"):
            short_conv(**halves, backend=backend)
        return
    y = short_conv(**halves, backend=backend)
    expected = short_conv(**{k: v.float() for k, v in halves.items()}, backend="naive")
    assert y.dtype == dtype
    assert relative_error(y, expected) <= TOLERANCE[str(dtype).removeprefix("torch.")]


@BACKENDS
def test_autocast_changes_nothing(backend):
    inputs = make_inputs(65)
    expected = short_conv(**inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = short_conv(**inputs, backend=backend)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


@DIRECTIONS
@BACKENDS
def test_padding_is_never_read(backend, reverse):
    inputs, lengths = make_inputs(20), torch.tensor([20, 2, 0])
    poisoned = inputs | {"x": inputs["x"].clone()}
    poisoned["x"][1, 2:] = poisoned["x"][2] = torch.nan
    clean = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend=backend)
    result = run_with_gradients(poisoned, lengths=lengths, reverse=reverse, backend=backend)
    assert [name for name in clean if not torch.equal(result[name], clean[name])] == []
    for name in ("y", "gradient of x"):
        assert not result[name][1, 2:].any() and not result[name][2].any(), name
    assert torch.equal(result["state"][2], inputs["initial_state"][2])


@BACKENDS
def test_reverse_is_flipping_within_valid_frames(backend):
    inputs, lengths = make_inputs(20), torch.tensor([20, 5, 1])
    flipped = inputs | {"x": flip_valid(inputs["x"], lengths)}
    y, state = short_conv(**inputs, lengths=lengths, reverse=True, return_final_state=True, backend=backend)
    expected, expected_state = short_conv(**flipped, lengths=lengths, return_final_state=True, backend=backend)
    assert relative_error(y, flip_valid(expected, lengths)) <= TOLERANCE["rounding"]
    assert torch.equal(state, expected_state)


@DIRECTIONS
@BACKENDS
@pytest.mark.parametrize("cut", [1, 2, 10, 19])
def test_pieces_equal_the_whole(cut, backend, reverse):
    inputs, lengths = make_inputs(20), torch.tensor([20, 11, 0])
    options = {"reverse": reverse, "return_final_state": True, "backend": backend}
    expected, expected_state = short_conv(**inputs, lengths=lengths, **options)
    pieces = [(slice(0, cut), lengths.clamp(max=cut)), (slice(cut, 20), (lengths - cut).clamp(min=0))]
    outputs, state = [], inputs["initial_state"]
    for frames, valid in reversed(pieces) if reverse else pieces:
        y, state = short_conv(
            **inputs | {"x": inputs["x"][:, frames], "initial_state": state}, lengths=valid, **options
        )
        outputs.append(y)
    assert relative_error(torch.cat(outputs[::-1] if reverse else outputs, dim=1), expected) <= TOLERANCE["rounding"]
    assert torch.equal(state, expected_state)


@DIRECTIONS
@BACKENDS
def test_no_frames(backend, reverse):
    inputs = make_inputs(0)
    y, state = short_conv(**inputs, reverse=reverse, return_final_state=True, backend=backend)
    assert y.shape == (3, 0, CHANNELS) and torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x", torch.randn(3, CHANNELS)),
        ("x", torch.ones(3, 7, CHANNELS, dtype=torch.long)),
        ("weight", torch.randn(CHANNELS, 1, 4)),
        ("weight", torch.randn(CHANNELS + 1, 4)),
        ("weight", torch.randn(CHANNELS, 0)),
        ("bias", torch.randn(CHANNELS - 1)),
        ("initial_state", torch.randn(3, 3, CHANNELS)),
        ("lengths", torch.tensor([1, 2])),
        ("lengths", torch.tensor([1, 2, 8])),
        ("activation", "relu"),
        ("backend", "cuda"),
    ],
    ids=lambda v: v if isinstance(v, str) else str(tuple(v.shape)),
)
def test_wrong_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}: .*expected"):
        short_conv(**make_inputs(7) | {argument: value})


def test_auto_is_the_first_that_can_run():
    inputs = make_inputs(65)
    assert torch.equal(short_conv(**inputs), short_conv(**inputs, backend="torch" if NO_NATIVE else "native"))
    exact = {name: v.double() for name, v in inputs.items()}
    assert torch.equal(short_conv(**exact), short_conv(**exact, backend="torch"))
