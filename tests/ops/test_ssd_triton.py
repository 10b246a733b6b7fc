"""The Triton kernels of SSD, in Triton's interpreter where there is no GPU: they equal the recurrence in float64.

One direction, the other and both in one call; the limits of sizes and machines are in ``test_ssd_triton_limits.py``.
"""

import pytest
import torch
from torch.nn import functional as F

from cald_speech.ops import ssd, ssd_bidirectional
from cald_speech.ops.ssd import triton as kernels
from tests.helpers import TOLERANCE, relative_error
from tests.ops.test_ssd import assert_same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCANS = pytest.mark.parametrize("scan", ["forward", "reverse", "both"])
ONE_WAY = pytest.mark.parametrize("scan", ["forward", "reverse"])
PER_FRAME = ("x", "dt", "B", "C")
# Past the check that refuses bfloat16 in the interpreter; a backend is given every argument.
BOTH = {"D": None, "lengths": None, "chunk_size": None}
ONE = BOTH | {"reverse": False, "initial_state": None, "return_final_state": False}


def ssd_triton(**arguments):
    return kernels.ssd_triton(**ONE | arguments)


def ssd_bidirectional_triton(**arguments):
    return kernels.ssd_bidirectional_triton(**BOTH | arguments)


def ssd_pair_triton(**arguments):
    return kernels.ssd_pair_triton(**BOTH | arguments)


def make_inputs(scan, num_frames, *, batch=2, heads=2, groups=1, head_dim=3, d_state=5, strength=None, left_out=()):
    """Inputs by name; ``strength`` makes every decay rate that strong, and steps even between 0 and 1."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    ways = (2,) if scan == "both" else ()
    dt, A = F.softplus(randn(batch, num_frames, *ways, heads) - 2), -randn(*ways, heads).exp()
    if strength is not None:
        dt, A = torch.rand(dt.shape, generator=g), torch.full_like(A, -strength)
    inputs = {
        "x": randn(batch, num_frames, heads, head_dim),
        "dt": dt,
        "A": A,
        "B": randn(batch, num_frames, groups, d_state),
        "C": randn(batch, num_frames, groups, d_state),
        "D": randn(heads),
        "initial_state": randn(batch, heads, head_dim, d_state),
    }
    return {name: v for name, v in inputs.items() if name not in left_out and (name, scan) != ("initial_state", "both")}


def call(scan, inputs, lengths=None, backend="triton", device=DEVICE):
    """Output and, of one direction, the final state. Goes past the check that refuses bfloat16 in the interpreter."""
    lengths = None if lengths is None else lengths.to(device)
    if scan == "both":
        if backend == "triton":
            return (ssd_bidirectional_triton(**inputs, lengths=lengths),)
        return (ssd_bidirectional(**inputs, lengths=lengths, backend=backend),)
    options = {"lengths": lengths, "reverse": scan == "reverse", "return_final_state": True}
    return ssd_triton(**inputs, **options) if backend == "triton" else ssd(**inputs, **options, backend=backend)


def run(scan, inputs, lengths=None, backend="triton"):
    """What ``call`` returns and the gradient of every input under fixed weights, all on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"
    leaves = {name: v.to(device).detach().requires_grad_() for name, v in inputs.items()}
    outputs = call(scan, leaves, lengths, backend, device)
    g = torch.Generator().manual_seed(1)
    # Eighths, which every dtype holds exactly.
    weights = [(torch.randint(-8, 9, v.shape, generator=g) / 8).to(v) for v in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = dict(zip(("y", "state"), outputs, strict=False))
    named |= {f"gradient of {name}": v for name, v in zip(leaves, gradients, strict=True)}
    return {name: v.detach().cpu() for name, v in named.items()}


def exact(scan, inputs, lengths=None):
    return run(scan, {name: v.double() for name, v in inputs.items()}, lengths, backend="naive")


def assert_parity(scan, inputs, lengths=None, tolerance=TOLERANCE["parity"]):
    assert_same(run(scan, inputs, lengths), exact(scan, inputs, lengths), tolerance)


def bits_differ(actual, expected):
    return [name for name in expected if not torch.equal(actual[name], expected[name])]


@SCANS
@pytest.mark.parametrize("num_frames", [1, 15, 64, 65, 130])
def test_equals_the_recurrence(num_frames, scan):
    assert_parity(scan, make_inputs(scan, num_frames), torch.tensor([num_frames, num_frames // 2]))


@SCANS
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 4, "groups": 2, "head_dim": 16, "d_state": 16},
        {"groups": 2, "head_dim": 20, "left_out": ("D",)},
        {"head_dim": 48, "left_out": ("initial_state",)},
        {"d_state": 70, "left_out": ("D", "initial_state")},
    ],
    ids=["two groups", "group per head", "head in two parts", "large state"],
)
def test_sizes_and_options(options, scan):
    assert_parity(scan, make_inputs(scan, 35, batch=1, **options))


@SCANS
@pytest.mark.parametrize("strength", [1e-6, 1.0, 50.0])
def test_decays_from_none_to_total(strength, scan):
    assert_parity(scan, make_inputs(scan, 70, batch=1, strength=strength))


@SCANS
def test_weak_decays_beside_strong_ones_are_exact(scan):
    """Between frames that forget everything, frames that hardly forget: float32 sums over both would lose 1e-4."""
    inputs = make_inputs(scan, 32, batch=1, strength=50.0)
    inputs["dt"][:, 8:24] = 1e-3
    assert_parity(scan, inputs, tolerance=TOLERANCE["rounding"])


@SCANS
def test_float16_inputs(scan):
    inputs = make_inputs(scan, 70)
    halves = {name: v.half() if name in PER_FRAME else v for name, v in inputs.items()}
    result = run(scan, halves, torch.tensor([70, 50]))
    assert result["y"].dtype == result["gradient of dt"].dtype == torch.float16
    assert_same(result, exact(scan, halves, torch.tensor([70, 50])), TOLERANCE["float16"])


@SCANS
def test_bfloat16_inputs(scan, bfloat16_interpreter):
    inputs = make_inputs(scan, 140, head_dim=16, d_state=16)
    halves = {name: v.bfloat16() if name in ("x", "B", "C") else v for name, v in inputs.items()}
    result = run(scan, halves, torch.tensor([140, 100]))
    assert result["y"].dtype == torch.bfloat16 and result["gradient of dt"].dtype == torch.float32
    assert_same(result, exact(scan, halves, torch.tensor([140, 100])), TOLERANCE["bfloat16"])


@SCANS
def test_padding_is_never_read(scan):
    inputs, lengths = make_inputs(scan, 35, batch=3), torch.tensor([35, 20, 0])
    poisoned = {name: v.clone() for name, v in inputs.items()}
    for name in PER_FRAME:
        poisoned[name][1, 20:] = poisoned[name][2] = torch.nan
    clean, result = run(scan, inputs, lengths), run(scan, poisoned, lengths)
    assert bits_differ(result, clean) == []
    for name in ("y", *(f"gradient of {name}" for name in PER_FRAME)):
        assert not result[name][1, 20:].any() and not result[name][2].any(), name
    if scan != "both":
        assert torch.equal(result["state"][2], inputs["initial_state"][2])


@SCANS
def test_the_output_s_gradient_at_padding_is_never_read(scan):
    inputs = {name: v.to(DEVICE).requires_grad_() for name, v in make_inputs(scan, 9).items()}
    grad = torch.randn(2, 9, 2, 3, device=DEVICE)
    grad[1, 7:] = torch.nan
    call(scan, inputs, torch.tensor([9, 7]))[0].backward(grad)
    assert all(torch.isfinite(v.grad).all() for v in inputs.values())


@SCANS
def test_slices_of_one_projection_and_twice_the_same(scan):
    """x, dt, B and C as a mixer has them: views into one tensor, whose other columns are never read."""
    inputs = make_inputs(scan, 33)
    expected = run(scan, inputs)
    widths = [inputs[name][0, 0].numel() for name in PER_FRAME]
    wide = torch.full((2, 33, sum(widths) + 7), torch.nan)
    slices = wide[..., 5:-2].split(widths, dim=-1)
    views = {name: v.unflatten(-1, inputs[name].shape[2:]) for name, v in zip(PER_FRAME, slices, strict=True)}
    for name, view in views.items():
        view.copy_(inputs[name])
    for again in (run(scan, inputs | views), run(scan, inputs)):
        assert bits_differ(again, expected) == []


@ONE_WAY
@pytest.mark.parametrize("cut", [1, 64])
def test_pieces_equal_the_whole(cut, scan):
    inputs, lengths = make_inputs(scan, 70), torch.tensor([70, 50])
    expected, expected_state = call(scan, {name: v.to(DEVICE) for name, v in inputs.items()}, lengths)
    pieces = [(slice(0, cut), lengths.clamp(max=cut)), (slice(cut, 70), (lengths - cut).clamp(min=0))]
    outputs, state = [], inputs["initial_state"]
    for frames, valid in reversed(pieces) if scan == "reverse" else pieces:
        piece = {name: v[:, frames] if name in PER_FRAME else v for name, v in inputs.items()}
        y, state = call(scan, {name: v.to(DEVICE) for name, v in (piece | {"initial_state": state}).items()}, valid)
        outputs.append(y)
    y = torch.cat(outputs[::-1] if scan == "reverse" else outputs, dim=1)
    assert relative_error(y, expected) <= TOLERANCE["rounding"]
    assert relative_error(state, expected_state) <= TOLERANCE["rounding"]


@SCANS
def test_no_frames(scan):
    inputs = {name: v.to(DEVICE).requires_grad_() for name, v in make_inputs(scan, 0).items()}
    y, *state = call(scan, inputs)
    assert y.shape == (2, 0, 2, 3)
    if state:
        (gradient,) = torch.autograd.grad(state[0].sum(), inputs["initial_state"])
        assert torch.equal(state[0], inputs["initial_state"]) and gradient.eq(1).all()
