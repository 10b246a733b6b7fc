"""The short convolution's compiled kernels: vectors, strips, blocks, threads, strides, offsets, the last bits."""

import pytest
import torch
from torch.nn import functional as F

from cald_speech.ops import short_conv
from cald_speech.ops.short_conv import native as kernels
from tests.helpers import TOLERANCE, needs_native, relative_error
from tests.ops.test_short_conv import DIRECTIONS, assert_same, make_inputs, run_with_gradients

pytestmark = needs_native


@pytest.fixture
def small_tasks(monkeypatch):
    """Many blocks, strips and threads already at a test's sizes."""
    for name, value in {"FRAMES_PER_TASK": 16, "STRIP_CHANNELS": 16, "ELEMENTS_PER_THREAD": 1}.items():
        monkeypatch.setattr(kernels, name, value)


@DIRECTIONS
@pytest.mark.parametrize("taps", [1, 3, 4, 18])
@pytest.mark.parametrize("channels", [1, 16, 35, 64])
@pytest.mark.parametrize("lengths", [(70, 37, 2), (64, 32, 0), (17, 16, 15)], ids=str)
def test_every_size(lengths, channels, taps, reverse, small_tasks):
    """Whole vectors and part of one; blocks and tiles, the last one whole or not; filters longer than a block."""
    inputs = make_inputs(70, channels=channels, taps=taps)
    for activation in ("silu", "identity"):
        options = {"lengths": torch.tensor(lengths), "reverse": reverse, "activation": activation}
        assert_same(*(run_with_gradients(inputs, backend=backend, **options) for backend in ("native", "torch")))


@DIRECTIONS
def test_any_number_of_threads_gives_the_same_bits(reverse, small_tasks):
    inputs, lengths, found = make_inputs(90, channels=40), torch.tensor([90, 33, 0]), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="native"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert [name for name in other if not torch.equal(other[name], found[0][name])] == []


def test_silu_and_its_slope_to_the_last_bits():
    """Of every size of sum: no exponent overflows, and far from zero nothing is left of 1 - sigmoid but itself."""
    sums = torch.cat([torch.linspace(-30, 30, 60001), torch.tensor([-1e30, -200.0, -100.0, 0.0, 100.0, 200.0, 1e30])])
    x, exact = (v.reshape(1, -1, 1).requires_grad_() for v in (sums, sums.double()))
    y = short_conv(x, torch.ones(1, 1), backend="native")
    F.silu(exact).sum().backward()
    y.backward(torch.ones_like(y))
    assert ((y - F.silu(exact)).abs() <= 2e-7 * exact.abs()).all()
    assert ((x.grad - exact.grad).abs() <= 4e-7).all()


def test_infinite_and_undefined_sums_are_torchs():
    x = torch.tensor([-torch.inf, torch.inf, torch.nan]).reshape(3, 1, 1)
    y = short_conv(x, torch.ones(1, 1), backend="native")
    assert torch.equal(y.isnan(), F.silu(x).isnan()) and y[1] == torch.inf


@DIRECTIONS
def test_slices_and_an_expanded_gradient(reverse):
    """x in the middle of rows and of more frames, weights transposed, the gradient of a sum."""
    inputs = make_inputs(40, channels=35)
    wide, wide_weight = torch.full((3, 44, 50), torch.nan), inputs["weight"].t().contiguous()
    wide[:, 2:42, 7:42] = inputs["x"]
    sliced = inputs | {"x": wide[:, 2:42, 7:42], "weight": wide_weight.t()}
    found = []
    for named, backend in ((sliced, "native"), (inputs, "torch")):
        leaves = [v.detach().requires_grad_() for v in named.values()]
        y = short_conv(**dict(zip(named, leaves, strict=True)), reverse=reverse, backend=backend)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    errors = [relative_error(a, e) for a, e in zip(*found, strict=True)]
    assert max(errors) <= TOLERANCE["parity"], errors


@DIRECTIONS
def test_offsets_past_two_to_the_31(reverse):
    """Sequences, then frames, so far apart in memory that is only touched where they lie."""
    far = 2**31 + 8
    for batch, num_frames, strides in ((2, 20, (far, 8, 1)), (1, 2, (0, far, 1))):
        inputs = make_inputs(num_frames, batch=batch)
        room = torch.empty((batch - 1) * strides[0] + (num_frames - 1) * strides[1] + 8)
        apart = room.as_strided(inputs["x"].shape, strides).copy_(inputs["x"])
        found, expected = [], []
        for result, x in ((found, apart), (expected, inputs["x"])):
            leaves = inputs | {"x": x.detach().requires_grad_()}
            y = short_conv(**leaves, reverse=reverse, backend="native")
            result += [y, *torch.autograd.grad(y.square().sum(), leaves["x"])]
        assert all(map(torch.equal, found, expected))


def test_sums_over_an_hour_do_not_drift():
    """Each frame adds 0.1 to the bias' gradient: a float32 that runs on would be off by a thousandth."""
    num_frames = 360_000
    bias = torch.zeros(1, requires_grad=True)
    y = short_conv(torch.zeros(1, num_frames, 1), torch.ones(1, 2), bias, activation="identity", backend="native")
    y.backward(torch.full_like(y, 0.1))
    assert bias.grad.item() == pytest.approx(0.1 * num_frames, rel=1e-6)


def test_weights_of_another_dtype():
    inputs = make_inputs(20)
    leaves = {name: v if name == "x" else v.to(torch.bfloat16).requires_grad_() for name, v in inputs.items()}
    y = short_conv(**leaves, backend="native")
    expected = short_conv(**{name: v.detach().float() for name, v in leaves.items()}, backend="torch")
    y.sum().backward()
    assert relative_error(y, expected) <= TOLERANCE["rounding"]
    assert {leaves[name].grad.dtype for name in ("weight", "bias", "initial_state")} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # it tells what it does not look into
def test_within_a_compiled_function():
    inputs = make_inputs(20)
    compiled = torch.compile(lambda x: 2 * short_conv(**inputs | {"x": 2 * x}, backend="native"), backend="eager")
    assert torch.equal(compiled(inputs["x"]), 2 * short_conv(**inputs | {"x": 2 * inputs["x"]}, backend="native"))


def test_float64_is_refused():
    with pytest.raises(ValueError, match="its arithmetic is float32"):
        short_conv(**make_inputs(6, dtype=torch.float64), backend="native")
