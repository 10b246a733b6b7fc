"""SSD: the fast paths equal the recurrence, padding is never read, pieces equal the whole, in both directions."""

import pytest
import torch
from torch.nn import functional as F

from cald_speech.ops import mask_padding, ssd
from tests.helpers import NO_NATIVE, TOLERANCE, flip_valid, relative_error

DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
HEADS, HEAD_DIM, D_STATE = 4, 3, 5


def make_inputs(num_frames, *, batch=3, groups=2, heads=HEADS, dtype=torch.float32, seed=0):
    """Inputs by name, with D and an initial state; decays that forget within one to some 100 frames."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    inputs = {
        "x": randn(batch, num_frames, heads, HEAD_DIM),
        "dt": F.softplus(randn(batch, num_frames, heads) - 2),
        "A": -torch.rand(heads, generator=g).mul(3).exp() / 4,
        "B": randn(batch, num_frames, groups, D_STATE),
        "C": randn(batch, num_frames, groups, D_STATE),
        "D": randn(heads),
        "initial_state": randn(batch, heads, HEAD_DIM, D_STATE),
    }
    return {name: v.to(dtype) for name, v in inputs.items()}


def run_with_gradients(inputs, **options):
    """Output, final state and the gradient of every input, under random weights of both."""
    leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
    y, state = ssd(**leaves, return_final_state=True, **options)
    g = torch.Generator().manual_seed(1)
    weigh = lambda v: (v * torch.randn(v.shape, generator=g)).sum()  # noqa: E731
    (weigh(y) + weigh(state)).backward()
    return {"y": y, "state": state} | {f"gradient of {name}": v.grad for name, v in leaves.items()}


def assert_same(actual, expected, tolerance=TOLERANCE["parity"]):
    errors = {name: relative_error(actual[name].detach(), expected[name].detach()) for name in expected}
    assert all(error <= tolerance for error in errors.values()), errors


@DIRECTIONS
@pytest.mark.parametrize("padded", [False, True], ids=["full", "with lengths"])
@pytest.mark.parametrize("num_frames", [1, 63, 64, 65, 1000])
def test_fast_equals_naive(num_frames, padded, reverse, fast_ssd_backend):
    inputs = make_inputs(num_frames)
    lengths = torch.tensor([num_frames, 2 * num_frames // 3, 0]) if padded else None
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    assert_same(run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend=fast_ssd_backend), expected)


@DIRECTIONS
@pytest.mark.parametrize("groups", [1, 2, HEADS], ids=["one group", "two groups", "group per head"])
@pytest.mark.parametrize("left_out", [(), ("D",), ("initial_state",)], ids=["all", "without D", "without state"])
def test_fast_equals_naive_with_groups_and_options(groups, left_out, reverse, fast_ssd_backend):
    inputs = {name: v for name, v in make_inputs(70, groups=groups).items() if name not in left_out}
    lengths = torch.tensor([70, 64, 3])
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    assert_same(run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend=fast_ssd_backend), expected)


@DIRECTIONS
def test_gradients_against_finite_differences(reverse, torch_ssd_backend):
    inputs = make_inputs(5, batch=2, heads=2, groups=1, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in inputs.values()]
    lengths = torch.tensor([5, 3])

    def function(*values):
        named = dict(zip(inputs, values, strict=True))
        return ssd(
            **named, lengths=lengths, reverse=reverse, return_final_state=True, chunk_size=2, backend=torch_ssd_backend
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("float32_dt", [False, True], ids=["dt half", "dt float32"])
def test_half_precision_inputs(dtype, float32_dt, ssd_backend):
    if ssd_backend == "native":
        with pytest.raises(ValueError, match="its arithmetic is float32"):
            ssd(**{name: v.to(dtype) for name, v in make_inputs(6).items()}, backend="native")
        return
    halves = {name: v.to(dtype) for name, v in make_inputs(65).items() if name != "initial_state"}
    if float32_dt:
        halves["dt"] = halves["dt"].float()
    y, state = ssd(**halves, return_final_state=True, backend=ssd_backend)
    expected, expected_state = ssd(
        **{k: v.float() for k, v in halves.items()}, return_final_state=True, backend="naive"
    )
    assert y.dtype == dtype and state.dtype == torch.float32
    assert relative_error(y, expected) <= TOLERANCE[str(dtype).removeprefix("torch.")]
    assert relative_error(state, expected_state) <= TOLERANCE["parity"]


def test_autocast_changes_nothing(ssd_backend):
    inputs = make_inputs(65)
    expected = ssd(**inputs, backend=ssd_backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ssd(**inputs, backend=ssd_backend)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


@DIRECTIONS
@pytest.mark.parametrize("strength", [1e-6, 1.0, 50.0])
def test_decays_from_none_to_total(strength, reverse, fast_ssd_backend):
    """dt |A| up to 50 a frame: log decays sum to 3,200 in a chunk, whose exp underflows and must not overflow."""
    inputs = make_inputs(200)
    inputs["dt"] = torch.rand(inputs["dt"].shape)
    inputs["A"] = torch.full((HEADS,), -strength)
    exact = {name: v.double() for name, v in inputs.items()}
    assert_same(
        run_with_gradients(inputs, reverse=reverse, backend=fast_ssd_backend),
        run_with_gradients(exact, reverse=reverse, backend="naive"),
    )


@DIRECTIONS
def test_padding_is_never_read(ssd_backend, reverse):
    inputs = make_inputs(70)
    lengths = torch.tensor([70, 40, 0])
    poisoned = dict(inputs)
    for name in ("x", "dt", "B", "C"):
        poisoned[name] = inputs[name].clone()
        poisoned[name][1, 40:] = poisoned[name][2] = torch.nan
    clean = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend=ssd_backend)
    result = run_with_gradients(poisoned, lengths=lengths, reverse=reverse, backend=ssd_backend)
    assert [name for name in clean if not torch.equal(result[name], clean[name])] == []
    for name in ("y", "gradient of x", "gradient of dt", "gradient of B", "gradient of C"):
        assert not result[name][1, 40:].any() and not result[name][2].any(), name
    assert torch.equal(result["state"][2], inputs["initial_state"][2])


def test_reverse_is_flipping_within_valid_frames(ssd_backend):
    inputs = make_inputs(70)
    lengths = torch.tensor([70, 65, 1])
    flipped = {k: flip_valid(v, lengths) if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
    y, state = ssd(**inputs, lengths=lengths, reverse=True, return_final_state=True, backend=ssd_backend)
    expected, expected_state = ssd(**flipped, lengths=lengths, return_final_state=True, backend=ssd_backend)
    assert relative_error(y, flip_valid(expected, lengths)) <= TOLERANCE["rounding"]
    assert relative_error(state, expected_state) <= TOLERANCE["rounding"]


@DIRECTIONS
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 70, 1000])
def test_chunk_size_does_not_matter(chunk_size, reverse, fast_ssd_backend):
    inputs, lengths = make_inputs(70), torch.tensor([70, 33, 0])
    expected = run_with_gradients(inputs, lengths=lengths, reverse=reverse, backend="naive")
    assert_same(
        run_with_gradients(inputs, lengths=lengths, reverse=reverse, chunk_size=chunk_size, backend=fast_ssd_backend),
        expected,
    )


@DIRECTIONS
@pytest.mark.parametrize("cut", [1, 64, 69])
def test_pieces_equal_the_whole(cut, ssd_backend, reverse):
    inputs, lengths = make_inputs(70), torch.tensor([70, 50, 0])
    options = {"reverse": reverse, "return_final_state": True, "backend": ssd_backend}
    expected, expected_state = ssd(**inputs, lengths=lengths, **options)
    pieces = [(slice(0, cut), lengths.clamp(max=cut)), (slice(cut, 70), (lengths - cut).clamp(min=0))]
    outputs, state = [], inputs["initial_state"]
    for frames, valid in reversed(pieces) if reverse else pieces:
        piece = {k: v[:, frames] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        y, state = ssd(**piece | {"initial_state": state}, lengths=valid, **options)
        outputs.append(y)
    y = torch.cat(outputs[::-1] if reverse else outputs, dim=1)
    assert relative_error(y, expected) <= TOLERANCE["rounding"]
    assert relative_error(state, expected_state) <= TOLERANCE["rounding"]


@DIRECTIONS
def test_no_frames(ssd_backend, reverse):
    inputs = make_inputs(0)
    y, state = ssd(**inputs, reverse=reverse, return_final_state=True, backend=ssd_backend)
    assert y.shape == (3, 0, HEADS, HEAD_DIM) and torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x", torch.randn(3, 6, 12)),
        ("x", torch.ones(3, 6, HEADS, HEAD_DIM, dtype=torch.long)),
        ("dt", torch.rand(3, 6, HEADS + 1)),
        ("A", -torch.rand(HEADS, 1)),
        ("B", torch.randn(3, 6, D_STATE)),
        ("B", torch.randn(3, 6, 3, D_STATE)),
        ("B", torch.randn(3, 5, 2, D_STATE)),
        ("C", torch.randn(3, 6, 2, D_STATE + 1)),
        ("D", torch.randn(HEADS, HEAD_DIM)),
        ("initial_state", torch.randn(3, HEADS, D_STATE, HEAD_DIM)),
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
        ssd(**make_inputs(6) | {argument: value})


def test_auto_is_the_first_that_can_run():
    inputs = make_inputs(65)
    assert torch.equal(ssd(**inputs), ssd(**inputs, backend="torch" if NO_NATIVE else "native"))
    exact = {name: v.double() for name, v in inputs.items()}
    assert torch.equal(ssd(**exact), ssd(**exact, backend="torch"))


def test_masking_the_input_is_giving_lengths():
    """What makes padding cheap: a frame with dt = 0 and x = 0 leaves the state alone, in either direction."""
    inputs, lengths = make_inputs(20), torch.tensor([20, 7, 0])
    masked = inputs | {name: mask_padding(inputs[name], lengths) for name in ("x", "dt")}
    for reverse in (False, True):
        y = ssd(**inputs, lengths=lengths, reverse=reverse)
        assert relative_error(y, mask_padding(ssd(**masked, reverse=reverse), lengths)) <= TOLERANCE["rounding"]
