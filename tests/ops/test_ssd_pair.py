"""Two SSD scans in one call equal two calls, forwards and in reverse, in outputs and gradients.

The Triton kernels run in Triton's interpreter where there is no GPU.
"""

import pytest
import torch
from torch.nn import functional as F

from cald_speech.ops import ssd, ssd_pair
from cald_speech.ops.backends import Request
from cald_speech.ops.ssd import BACKENDS
from cald_speech.ops.ssd.triton.outputs import outputs_kernel
from tests.helpers import TOLERANCE
from tests.ops.test_ssd import assert_same
from tests.ops.test_ssd_triton import DEVICE, bits_differ, ssd_pair_triton, ssd_triton

NAMES = ("x", "dt", "A", "B", "C", "D")
PER_FRAME = ("x", "dt", "B", "C")


def make_pairs(num_frames, *, batch=3, heads=4, groups=2, head_dim=3, d_state=5, left_out=()):
    """Pairs by name, on the CPU in float32."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    make = {
        "x": lambda: randn(batch, num_frames, heads, head_dim),
        "dt": lambda: F.softplus(randn(batch, num_frames, heads) - 2),
        "A": lambda: -randn(heads).exp(),
        "B": lambda: randn(batch, num_frames, groups, d_state),
        "C": lambda: randn(batch, num_frames, groups, d_state),
        "D": lambda: randn(heads),
    }
    return {name: (new(), new()) for name, new in make.items() if name not in left_out}


def scattered(pairs):
    """The same numbers: the past as slices of one wide tensor, whose other columns hold NaN; the future with the frames
    of all sequences side by side."""
    widths = [pairs[name][0][0, 0].numel() for name in PER_FRAME]
    wide = pairs["x"][0].new_full((*pairs["x"][0].shape[:2], sum(widths) + 7), torch.nan)
    slices = dict(zip(PER_FRAME, wide[..., 5:-2].split(widths, dim=-1), strict=True))
    views = {name: v.unflatten(-1, pairs[name][0].shape[2:]) for name, v in slices.items()}
    for name, view in views.items():
        view.copy_(pairs[name][0])
    return pairs | {name: (views[name], pairs[name][1].transpose(0, 1).contiguous().transpose(0, 1)) for name in views}


def cast(pairs, function):
    return {name: tuple(map(function, pair)) for name, pair in pairs.items()}


def two_calls(scan, **options):
    """``ssd_pair`` by a function for one scan."""

    def both(lengths=None, **pairs):
        past, future = ({name: pair[k] for name, pair in pairs.items()} for k in range(2))
        return scan(**past, lengths=lengths, **options), scan(**future, lengths=lengths, reverse=True, **options)

    return both


def run(function, pairs, lengths=None, **options):
    """Outputs and the gradients of all inputs under fixed weights, by name, all on the CPU."""
    # Strides are kept: detach, unlike clone, makes no copy.
    leaves = cast(pairs, lambda v: v.detach().requires_grad_())
    outputs = function(**leaves, lengths=None if lengths is None else lengths.to(leaves["x"][0].device), **options)
    g = torch.Generator().manual_seed(1)
    weights = [(torch.randint(-8, 9, y.shape, generator=g) / 8).to(y) for y in outputs]
    flat = {
        f"{name} {way}": v for name, pair in leaves.items() for way, v in zip(("past", "future"), pair, strict=True)
    }
    gradients = torch.autograd.grad(outputs, list(flat.values()), weights)
    named = dict(zip(("y past", "y future"), outputs, strict=True))
    named |= {f"gradient of {name}": v for name, v in zip(flat, gradients, strict=True)}
    return {name: v.detach().cpu() for name, v in named.items()}


def exact(pairs, lengths=None):
    return run(two_calls(ssd, backend="naive"), cast(pairs, torch.Tensor.double), lengths)


@pytest.fixture(params=[name for name in BACKENDS if name != "triton"])
def backend(request):
    if reason := BACKENDS[request.param].why_not(Request(torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("groups", [1, 4], ids=["one group", "group per head"])
@pytest.mark.parametrize("num_frames", [1, 37, 130])
def test_equals_two_scans(num_frames, groups, backend):
    pairs = make_pairs(num_frames, groups=groups)
    for lengths in (None, torch.tensor([num_frames, num_frames // 2, 0])):
        assert_same(run(ssd_pair, pairs, lengths, backend=backend), exact(pairs, lengths), TOLERANCE["parity"])


def test_strides_may_differ_and_the_direct_path_may_be_left_out(backend):
    pairs = make_pairs(37, left_out=("D",))
    expected = exact(pairs)
    assert_same(run(ssd_pair, scattered(pairs), backend=backend), expected, TOLERANCE["parity"])


def test_no_frames(backend):
    assert [y.shape for y in ssd_pair(**make_pairs(0), backend=backend)] == [(3, 0, 4, 3)] * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda past, future: past, r"Tensor"),
        (lambda past, future: (past,), r"1 of them"),
        (lambda past, future: (past, None), r"2 of them"),
        (lambda past, future: (past, future[..., :-1]), r"\(.*\) torch.float32 on cpu and \(.*\) torch.float32 on cpu"),
        (lambda past, future: (past, future.double()), r"\(.*\) torch.float32 on cpu and \(.*\) torch.float64 on cpu"),
    ],
    ids=["one tensor", "one of two", "not a tensor", "another shape", "another dtype"],
)
def test_what_is_no_pair_is_refused_by_name(name, spoil, got):
    pairs = make_pairs(5)
    pairs[name] = spoil(*pairs[name])
    with pytest.raises(ValueError, match=rf"^{name}: expected .*past and future.*, got {got}"):
        ssd_pair(**pairs)


def test_what_does_not_fit_together_is_refused_as_in_one_scan():
    pairs = make_pairs(5)
    with pytest.raises(ValueError, match=r"^dt: expected shape \(3, 5, 4\)"):
        ssd_pair(**pairs | {"dt": tuple(v[:, :4] for v in pairs["dt"])})
    with pytest.raises(ValueError, match=r"^chunk_size: expected at least 1, got 0"):
        ssd_pair(**pairs, chunk_size=0)


class TestTriton:
    """Of tiny sizes: the interpreter takes milliseconds for every program."""

    @pytest.mark.parametrize(
        "options",
        [
            {"groups": 1},
            {"heads": 2, "head_dim": 20, "d_state": 16, "left_out": ("D",)},
            {"heads": 1, "groups": 1, "head_dim": 48, "d_state": 66},
        ],
        ids=["one group", "no direct path", "head in two parts"],
    )
    def test_equals_one_scan_at_a_time(self, options):
        pairs, lengths = make_pairs(33, **{"batch": 2, "heads": 2} | options), torch.tensor([33, 9])
        there = cast(pairs, lambda v: v.to(DEVICE))
        result, expected = run(ssd_pair_triton, there, lengths), run(two_calls(ssd_triton), there, lengths)
        assert_same(result, expected, TOLERANCE["rounding"])
        assert_same(result, exact(pairs, lengths), TOLERANCE["parity"])

    def test_float16_inputs_and_an_empty_sequence(self):
        pairs, lengths = make_pairs(66, heads=2), torch.tensor([66, 20, 0])
        halves = pairs | cast({name: pairs[name] for name in ("x", "B", "C")}, torch.Tensor.half)
        result = run(ssd_pair_triton, cast(halves, lambda v: v.to(DEVICE)), lengths)
        assert result["y past"].dtype == torch.float16 and not result["y future"][2].any()
        assert_same(result, exact(halves, lengths), TOLERANCE["float16"])

    def test_strides_may_differ_and_two_runs_are_equal_to_the_bit(self):
        pairs = cast(make_pairs(33, batch=1, heads=2), lambda v: v.to(DEVICE))
        expected = run(ssd_pair_triton, pairs)
        for again in (scattered(pairs), pairs):
            assert bits_differ(run(ssd_pair_triton, again), expected) == []

    def test_one_output_alone_has_gradients(self):
        pairs = cast(make_pairs(9, heads=2), lambda v: v.to(DEVICE).requires_grad_())
        ssd_pair_triton(**pairs)[1].sum().backward()
        assert not pairs["x"][0].grad.any() and pairs["x"][1].grad.any()

    def test_no_frames(self):
        assert [y.shape for y in ssd_pair_triton(**make_pairs(0))] == [(3, 0, 4, 3)] * 2

    def test_launches_no_more_kernels_than_one_scan(self, monkeypatch):
        launched, kernel = [], type(outputs_kernel)
        get = kernel.__getitem__
        monkeypatch.setattr(kernel, "__getitem__", lambda self, grid: launched.append(self.__name__) or get(self, grid))
        pairs = cast(make_pairs(9, batch=1, heads=2), lambda v: v.to(DEVICE))
        run(ssd_pair_triton, pairs)
        together, one = launched.copy(), {name: v[0].requires_grad_() for name, v in pairs.items()}
        launched.clear()
        ssd_triton(**one).sum().backward()
        assert together == launched and len(launched) == 11

    def test_the_op_reaches_the_kernels(self):
        pairs = cast(make_pairs(9, batch=1, heads=2), lambda v: v.to(DEVICE))
        assert all(map(torch.equal, ssd_pair(**pairs, backend="triton"), ssd_pair_triton(**pairs)))
