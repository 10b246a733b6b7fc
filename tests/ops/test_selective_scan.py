"""The selective scan: the blocked path equals the recurrence, padding is never read, pieces equal the whole."""

import pytest
import torch
from torch.nn import functional as F

from cald_speech.ops import selective_scan
from tests.helpers import NATIVE, NO_NATIVE, TOLERANCE, flip_valid, relative_error

DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
BACKENDS = pytest.mark.parametrize("backend", ["naive", "torch", NATIVE])
FAST = pytest.mark.parametrize("backend", ["torch", NATIVE])
CHANNELS, D_STATE = 6, 5
FRAMEWISE = ("x", "dt", "B", "C")


def make_inputs(num_frames, *, batch=3, groups=2, channels=CHANNELS, d_state=D_STATE, dtype=torch.float32):
    """Inputs by name, with D and an initial state; decays that forget within one to some 100 frames."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    inputs = {
        "x": randn(batch, num_frames, channels),
        "dt": F.softplus(randn(batch, num_frames, channels) - 2),
        "A": -torch.rand(channels, d_state, generator=g).mul(3).exp() / 4,
        "B": randn(batch, num_frames, groups, d_state),
        "C": randn(batch, num_frames, groups, d_state),
        "D": randn(channels),
        "initial_state": randn(batch, channels, d_state),
    }
    return {name: v.to(dtype) for name, v in inputs.items()}


def run_with_gradients(inputs, **options):
    """Output, final state and the gradient of every input, under random weights of both."""
    leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
    y, state = selective_scan(**leaves, return_final_state=True, **options)
    g = torch.Generator().manual_seed(1)
    weigh = lambda v: (v * torch.randn(v.shape, generator=g)).sum()  # noqa: E731
    (weigh(y) + weigh(state)).backward()
    return {"y": y, "state": state} | {f"gradient of {name}": v.grad for name, v in leaves.items()}


def assert_same(actual, expected, tolerance=TOLERANCE["parity"]):
    errors = {name: relative_error(actual[name].detach(), expected[name].detach()) for name in expected}
    assert all(error <= tolerance for error in errors.values()), errors


@FAST
@DIRECTIONS
@pytest.mark.parametrize("padded", [False, True], ids=["full", "with lengths"])
@pytest.mark.parametrize("num_frames", [1, 15, 16, 17, 300])
def test_blocks_equal_naive(num_frames, padded, reverse, backend):
    inputs = make_inputs(num_frames)
    lengths = torch.tensor([num_frames, 2 * num_frames // 3, 0]) if padded else None
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    actual = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend=backend, chunk_size=16)
    assert_same(actual, expected)


@FAST
@DIRECTIONS
@pytest.mark.parametrize("groups", [1, 2, CHANNELS], ids=["one group", "two groups", "group per channel"])
@pytest.mark.parametrize("left_out", [(), ("D",), ("initial_state",)], ids=["all", "without D", "without state"])
def test_blocks_equal_naive_with_groups_and_options(groups, left_out, reverse, backend):
    inputs = {name: v for name, v in make_inputs(40, groups=groups).items() if name not in left_out}
    lengths = torch.tensor([40, 32, 3])
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    assert_same(run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend=backend, chunk_size=8), expected)


@FAST
@DIRECTIONS
def test_sequences_taken_one_by_one_equal_naive(reverse, backend):
    """Wide enough that a sequence alone fills a frame of scratch, and that a block has its least number of frames."""
    inputs, lengths = make_inputs(35, channels=512, d_state=40), torch.tensor([20, 35, 0])
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    assert_same(run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend=backend), expected)


@DIRECTIONS
def test_gradients_against_finite_differences(reverse):
    inputs = make_inputs(5, batch=2, channels=4, groups=2, d_state=3, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in inputs.values()]
    options = {"lengths": torch.tensor([5, 3]), "reverse": reverse, "return_final_state": True, "chunk_size": 2}

    def function(*values):
        return selective_scan(**dict(zip(inputs, values, strict=True)), **options, backend="torch")

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("float32_dt", [False, True], ids=["dt half", "dt float32"])
def test_half_precision_inputs(dtype, float32_dt, backend):
    halves = {name: v.to(dtype) for name, v in make_inputs(65).items() if name != "initial_state"}
    if float32_dt:
        halves["dt"] = halves["dt"].float()
    actual = run_with_gradients(halves, backend=backend)
    expected = run_with_gradients({k: v.float() for k, v in halves.items()}, backend="naive")
    assert actual["y"].dtype == dtype and actual["state"].dtype == torch.float32
    assert relative_error(actual["state"], expected["state"]) <= TOLERANCE["parity"]
    assert all(actual[f"gradient of {name}"].dtype == v.dtype for name, v in halves.items())
    assert_same(actual, expected, TOLERANCE[str(dtype).removeprefix("torch.")])


@BACKENDS
def test_autocast_changes_nothing(backend):
    inputs = make_inputs(65)
    expected = selective_scan(**inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(**inputs, backend=backend)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


@FAST
@DIRECTIONS
@pytest.mark.parametrize("strength", [1e-6, 1.0, 50.0])
def test_decays_from_none_to_total(strength, reverse, backend):
    """dt |A| up to 50 a frame, whose decays over a few frames underflow and must not turn into anything else."""
    inputs = make_inputs(200)
    inputs["dt"] = torch.rand(inputs["dt"].shape)
    inputs["A"] = torch.full((CHANNELS, D_STATE), -strength)
    exact = {name: v.double() for name, v in inputs.items()}
    assert_same(
        run_with_gradients(inputs, reverse=reverse, backend=backend),
        run_with_gradients(exact, reverse=reverse, backend="naive"),
    )


@FAST
def test_gradients_of_total_forgetting_keep_their_size(backend):
    """Decays near exp(-30): the gradient of A is some 1e-13, and nothing larger may be subtracted on the way to it."""
    inputs = make_inputs(50)
    inputs["dt"], inputs["A"] = torch.ones_like(inputs["dt"]), torch.full((CHANNELS, D_STATE), -30.0)
    exact = {name: v.double() for name, v in inputs.items()}
    assert_same(run_with_gradients(inputs, backend=backend), run_with_gradients(exact, backend="naive"))


@DIRECTIONS
@BACKENDS
def test_padding_is_never_read(backend, reverse):
    inputs, lengths = make_inputs(70), torch.tensor([70, 40, 0])
    poisoned = dict(inputs)
    for name in FRAMEWISE:
        poisoned[name] = inputs[name].clone()
        poisoned[name][1, 40:] = poisoned[name][2] = torch.nan
    options = {"lengths": lengths, "reverse": reverse, "backend": backend, "chunk_size": 16}
    clean, result = run_with_gradients(inputs, **options), run_with_gradients(poisoned, **options)
    assert [name for name in clean if not torch.equal(result[name], clean[name])] == []
    for name in ("y", *(f"gradient of {name}" for name in FRAMEWISE)):
        assert not result[name][1, 40:].any() and not result[name][2].any(), name
    assert torch.equal(result["state"][2], inputs["initial_state"][2])


@FAST
def test_the_output_s_gradient_at_padding_is_never_read(backend):
    inputs, lengths = make_inputs(20), torch.tensor([20, 7, 0])
    leaves = {name: v.requires_grad_() for name, v in inputs.items()}
    grad = torch.randn(inputs["x"].shape)
    grad[1, 7:] = grad[2] = torch.nan
    selective_scan(**leaves, lengths=lengths, backend=backend).backward(grad)
    assert all(torch.isfinite(v.grad).all() for v in leaves.values())


@BACKENDS
def test_reverse_is_flipping_within_valid_frames(backend):
    inputs, lengths = make_inputs(70), torch.tensor([70, 65, 1])
    flipped = {k: flip_valid(v, lengths) if k in FRAMEWISE else v for k, v in inputs.items()}
    y, state = selective_scan(**inputs, lengths=lengths, reverse=True, return_final_state=True, backend=backend)
    expected, expected_state = selective_scan(**flipped, lengths=lengths, return_final_state=True, backend=backend)
    assert relative_error(y, flip_valid(expected, lengths)) <= TOLERANCE["rounding"]
    assert relative_error(state, expected_state) <= TOLERANCE["rounding"]


@FAST
@DIRECTIONS
@pytest.mark.parametrize("chunk_size", [1, 7, 70, 1000])
def test_chunk_size_does_not_matter(chunk_size, reverse, backend):
    inputs, lengths = make_inputs(70), torch.tensor([70, 33, 0])
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend=backend)
    assert_same(
        run_with_gradients(inputs, lengths=lengths, reverse=reverse, chunk_size=chunk_size, backend=backend),
        expected,
        TOLERANCE["rounding"],
    )


@DIRECTIONS
@BACKENDS
@pytest.mark.parametrize("cut", [1, 64, 69])
def test_pieces_equal_the_whole(cut, backend, reverse):
    inputs, lengths = make_inputs(70), torch.tensor([70, 50, 0])
    options = {"reverse": reverse, "return_final_state": True, "backend": backend}
    expected, expected_state = selective_scan(**inputs, lengths=lengths, **options)
    pieces = [(slice(0, cut), lengths.clamp(max=cut)), (slice(cut, 70), (lengths - cut).clamp(min=0))]
    outputs, state = [], inputs["initial_state"]
    for frames, valid in reversed(pieces) if reverse else pieces:
        piece = {k: v[:, frames] if k in FRAMEWISE else v for k, v in inputs.items()}
        y, state = selective_scan(**piece | {"initial_state": state}, lengths=valid, **options)
        outputs.append(y)
    y = torch.cat(outputs[::-1] if reverse else outputs, dim=1)
    assert relative_error(y, expected) <= TOLERANCE["rounding"]
    assert relative_error(state, expected_state) <= TOLERANCE["rounding"]


@DIRECTIONS
@BACKENDS
def test_no_frames(backend, reverse):
    inputs = make_inputs(0)
    result = run_with_gradients(inputs, reverse=reverse, backend=backend)
    assert result["y"].shape == (3, 0, CHANNELS) and torch.equal(result["state"], inputs["initial_state"])
    assert result["gradient of initial_state"].any()


@FAST
def test_slices_of_wider_tensors(backend):
    """x, dt, B and C as a mixer hands them over: slices of one projection, nothing contiguous."""
    inputs = make_inputs(40)
    wide = {name: torch.randn(*v.shape[:-1], v.size(-1) + 3) for name, v in inputs.items() if name in FRAMEWISE}
    sliced = dict(inputs)
    for name, v in wide.items():
        v[..., 2:-1] = inputs[name]
        sliced[name] = v[..., 2:-1]
    sliced["A"] = inputs["A"].t().contiguous().t()
    expected = run_with_gradients(inputs, backend=backend)
    assert torch.equal(selective_scan(**sliced, backend=backend), expected["y"])
    sliced = {name: v.detach().requires_grad_() for name, v in sliced.items()}
    g = torch.Generator().manual_seed(1)
    y, state = selective_scan(**sliced, return_final_state=True, backend=backend)
    ((y * torch.randn(y.shape, generator=g)).sum() + (state * torch.randn(state.shape, generator=g)).sum()).backward()
    assert_same({f"gradient of {k}": v.grad for k, v in sliced.items()} | {"y": y, "state": state}, expected)


@FAST
def test_only_what_is_asked_for_gets_a_gradient(backend):
    inputs = make_inputs(20)
    inputs["dt"].requires_grad_()
    selective_scan(**inputs, backend=backend).sum().backward()
    assert [name for name, v in inputs.items() if v.grad is not None] == ["dt"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x", torch.randn(3, CHANNELS)),
        ("x", torch.ones(3, 6, CHANNELS, dtype=torch.long)),
        ("dt", torch.rand(3, 6, CHANNELS + 1)),
        ("A", -torch.rand(CHANNELS)),
        ("A", -torch.rand(CHANNELS, D_STATE).double().long()),
        ("B", torch.randn(3, 6, D_STATE)),
        ("B", torch.randn(3, 6, 4, D_STATE)),
        ("B", torch.randn(3, 5, 2, D_STATE)),
        ("C", torch.randn(3, 6, 2, D_STATE + 1)),
        ("D", torch.randn(CHANNELS, 1)),
        ("initial_state", torch.randn(3, D_STATE, CHANNELS)),
        ("lengths", torch.tensor([1, 2])),
        ("lengths", torch.tensor([1, 2, 7])),
        ("lengths", torch.tensor([1, 2, -1])),
        ("chunk_size", 0),
        ("backend", "cuda"),
    ],
    ids=lambda v: v if isinstance(v, str) else str(tuple(v.shape)) if isinstance(v, torch.Tensor) else str(v),
)
def test_wrong_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}: .*expected"):
        selective_scan(**make_inputs(6) | {argument: value})


@pytest.mark.parametrize(("argument", "value"), [("dt", 0.0), ("dt", -1.0), ("dt", torch.nan), ("A", 0.0)])
def test_signs_are_checked_in_debug_mode_at_valid_frames(argument, value, monkeypatch):
    inputs, lengths = make_inputs(6), torch.tensor([6, 4, 0])
    inputs["dt"][1, 4:] = -1.0
    selective_scan(**inputs, lengths=lengths)
    monkeypatch.setenv("CALD_SPEECH_DEBUG", "1")
    selective_scan(**inputs, lengths=lengths)
    inputs[argument][1, 3] = value
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        selective_scan(**inputs, lengths=lengths)


def test_auto_is_the_first_that_can_run():
    inputs = make_inputs(65)
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend="torch" if NO_NATIVE else "native"))
