"""The Triton kernels beyond the contract: sizes, precision across chunks, tiles, launches, offsets, what is refused.

In Triton's interpreter where there is no GPU, where it takes milliseconds for every program: sizes are tiny.
"""

import os
import subprocess
import sys

import pytest
import torch

from cald_speech.ops.gated_delta.triton import warmup as warmup_gated_delta
from cald_speech.ops.selective_scan.triton import launch
from cald_speech.ops.selective_scan.triton import warmup as warmup_selective_scan
from cald_speech.ops.short_conv.triton import warmup as warmup_short_conv
from cald_speech.ops.ssd.triton import warmup as warmup_ssd
from cald_speech.ops.ssd.triton.outputs import outputs_kernel
from tests.helpers import TOLERANCE, relative_error
from tests.ops.cases import TRITON_DEVICE, Way, assert_same, call, exact, is_framewise
from tests.ops.conftest import set_tiles, short_chunks, small_tiles

ONE, BOTH, PAIR = (Way(op, "triton", sizes={"heads": 1}) for op in ("ssd", "ssd_bidirectional", "ssd_pair"))
SELECTIVE, CONV = Way("selective_scan", "triton"), Way("short_conv", "triton")
DELTA = Way("gated_delta", "triton", sizes={"heads": 1})
EVERY_SSD = pytest.mark.parametrize("way", [ONE, BOTH, PAIR], ids=str)
BOTH_WAYS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def of(way, num_frames, **sizes):
    """Inputs of one sequence with one group, unless said."""
    return way.inputs(num_frames, **({"batch": 1, "groups": 1} | sizes))


@EVERY_SSD
@pytest.mark.parametrize("sizes", [{"head_dim": 48}, {"d_state": 70}], ids=["head in two parts", "large state"])
def test_sizes_of_an_ssd(way, sizes):
    num_frames = 33 if "head_dim" in sizes else 17
    inputs = of(way, num_frames, **sizes)
    assert_same(way.run(inputs), exact(way.op, inputs))


@pytest.mark.parametrize("way", [ONE, BOTH], ids=str)
def test_weak_decays_beside_strong_ones_are_exact(way):
    """Between frames that forget everything, frames that hardly forget: float32 sums over both would lose 1e-4."""
    inputs = of(way, 32, strength=50.0)
    inputs["dt"][:, 8:24] = 1e-3
    assert_same(way.run(inputs), exact(way.op, inputs), TOLERANCE["rounding"])


def test_a_decay_a_head_of_a_gated_delta(launched, monkeypatch):
    """The contract's has one for each channel. Two blocks of values, of keys and of frames; two heads of one group; v
    by heads in memory, as attention keeps it."""
    small_tiles(monkeypatch)
    inputs, lengths = of(DELTA, 18, heads=2, head_dim=17, d_state=18), torch.tensor([17])
    inputs["v"] = inputs["v"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(DELTA.run(inputs, lengths), exact(DELTA.op, inputs, lengths))
    carried = ["chunks_kernel", "states_kernel"]
    backward = ["states_gradient_kernel", "pairs_gradient_kernel", "keys_gradient_kernel"]
    assert launched == [*carried, "outputs_kernel", *carried, *backward]


@pytest.mark.parametrize(
    ("dtype", "per_channel"),
    [
        pytest.param(torch.float16, False, marks=pytest.mark.wide),
        (torch.float16, True),
        (torch.bfloat16, False),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_half_precision_of_a_gated_delta(dtype, per_channel, bfloat16_interpreter):
    """q, k and v; what else there is stays in float32, as the mixer keeps it."""
    inputs = of(DELTA, 33, head_dim=16, d_state=16, per_channel=per_channel)
    inputs = {name: v.to(dtype) if name in "qkv" else v for name, v in inputs.items()}
    actual = DELTA.run(inputs, reverse=True)
    assert actual["y"].dtype == dtype and actual["state"].dtype == torch.float32
    assert all(actual[f"gradient of {name}"].dtype == v.dtype for name, v in inputs.items())
    expected = exact(DELTA.op, inputs, reverse=True)
    assert_same(actual, expected, TOLERANCE[str(dtype).removeprefix("torch.")])


@EVERY_SSD
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_across_chunks(way, dtype, bfloat16_interpreter):
    """Chunks have up to 64 frames in float16 and 128 in bfloat16; parameters stay in float32, as mixers keep them."""
    num_frames = {torch.float16: 66, torch.bfloat16: 130}[dtype]
    inputs = of(way, num_frames, batch=2, head_dim=16, d_state=16)
    inputs = {name: v.to(dtype) if name.split()[0] in "xBC" else v for name, v in inputs.items()}
    lengths = torch.tensor([num_frames, 20])
    actual = way.run(inputs, lengths)
    assert all(v.dtype == dtype for name, v in actual.items() if name.startswith("y"))
    assert all(actual[f"gradient of {name}"].dtype == v.dtype for name, v in inputs.items())
    assert_same(actual, exact(way.op, inputs, lengths), TOLERANCE[str(dtype).removeprefix("torch.")])


@pytest.mark.parametrize("way", [SELECTIVE, CONV], ids=str)
def test_half_precision_inputs(way, monkeypatch):
    short_chunks(monkeypatch)
    set_tiles(monkeypatch, frames=16, channels=8, tiles=1)
    inputs = {name: v.half() for name, v in of(way, 5).items()}
    actual = way.run(inputs)
    assert all(v.dtype == torch.float16 for name, v in actual.items() if name != "state")
    assert actual["state"].dtype == (torch.float32 if way is SELECTIVE else torch.float16)
    assert_same(actual, exact(way.op, inputs), TOLERANCE["float16"])


def test_one_output_of_a_pair_alone_has_gradients():
    inputs = {name: v.to(TRITON_DEVICE).requires_grad_() for name, v in of(PAIR, 9).items()}
    PAIR.call(inputs)["y future"].sum().backward()
    assert not inputs["x past"].grad.any() and inputs["x future"].grad.any()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels, as they are launched."""
    names, kernel = [], type(outputs_kernel)
    get = kernel.__getitem__
    monkeypatch.setattr(kernel, "__getitem__", lambda self, grid: names.append(self.__name__) or get(self, grid))
    return names


def test_a_pair_launches_no_more_kernels_than_one_scan(launched):
    PAIR.run(of(PAIR, 9))
    together = launched.copy()
    launched.clear()
    ONE.run({name: v for name, v in of(ONE, 9).items() if name != "initial_state"})
    assert [name for name in together if name != "carry_kernel"] == [n for n in launched if n != "carry_kernel"]
    assert len(together) == len(launched) == 11


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "frames", "heads"])
def test_offsets_of_an_ssd_past_2_31_elements(axis):
    """x, B, C and dy whose sequences, frames or heads lie 2^31 elements apart; only the touched pages exist."""
    inputs = BOTH.inputs(2, batch=2, heads=2, groups=2, head_dim=4, d_state=4)
    inputs = {name: v.half() if name in "xBC" else v for name, v in inputs.items()}
    far = torch.empty(2**31 + 512, dtype=torch.float16, device=TRITON_DEVICE)
    strides = [64, 32, 16]
    strides[axis] = 2**31
    places = {"x": 0, "B": 4, "C": 8, "dy": 12}
    views = {name: far.as_strided((2, 2, 2, 4), (*strides, 1), start) for name, start in places.items()}
    for name, view in views.items():
        view.copy_(inputs.get(name, torch.ones(2, 2, 2, 4)))
    dy = views.pop("dy")
    leaves = {name: v.detach().to(TRITON_DEVICE).requires_grad_() for name, v in (inputs | views).items()}
    y = BOTH.call(leaves)["y"]
    actual = [y, *torch.autograd.grad(y, list(leaves.values()), dy)]
    near = {name: v.double().requires_grad_() for name, v in inputs.items()}
    y = call(BOTH.op, near, "naive")["y"]
    expected = [y, *torch.autograd.grad(y, list(near.values()), torch.ones_like(y))]
    errors = [relative_error(a.detach().cpu(), e.detach()) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) <= TOLERANCE["float16"], errors


def test_offsets_of_a_gated_delta_past_2_31_elements(monkeypatch):
    """Everything framewise and the output's gradient with frames 2^31 elements apart; only touched pages exist."""
    small_tiles(monkeypatch)
    far = torch.empty(2**31 + 512, dtype=torch.float16, device=TRITON_DEVICE)
    inputs = {name: v.half() if is_framewise(name) else v for name, v in of(DELTA, 2, per_channel=True).items()}
    inputs["dy"] = torch.randn(1, 2, 1, 3).half()
    views = dict(inputs)
    for number, name in enumerate(name for name in inputs if is_framewise(name) or name == "dy"):
        v = inputs[name]
        views[name] = far.as_strided(v.shape, (1, 2**31, *(8, 1)[4 - v.dim() :]), 16 * number).copy_(v)
    results = []
    for values, backend in ((views, "triton"), (inputs, "naive")):
        leaves = {name: v.detach().to(TRITON_DEVICE).requires_grad_() for name, v in values.items()}
        dy = leaves.pop("dy").detach()
        y = call(DELTA.op, leaves, backend)["y"]
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
        results.append(dict(zip(("y", *leaves), (y.detach(), *gradients), strict=True)))
    assert_same(*results, TOLERANCE["float16"])


@pytest.mark.slow  # the interpreter at real sizes
def test_real_sizes_of_a_selective_scan():
    """The contract's chunks are short."""
    inputs, lengths = of(SELECTIVE, 18, batch=2, channels=5, d_state=3), torch.tensor([18, 7])
    options = {"reverse": True, "chunk_size": 8}
    assert_same(SELECTIVE.run(inputs, lengths, **options), exact("selective_scan", inputs, lengths, **options))


@pytest.mark.parametrize("together", [1, 4], ids=["a program each", "one program"])
def test_blocks_of_channels_of_a_selective_scan(together, monkeypatch):
    """Three blocks of channels, the last one partly filled, whose gradients of B and C are added up."""
    short_chunks(monkeypatch)
    for name in ("FORWARD_CHANNELS", "BACKWARD_CHANNELS"):
        monkeypatch.setattr(launch, name, 2)
    monkeypatch.setattr(launch, "blocks_together", lambda *shapes: together)
    inputs = of(SELECTIVE, 5, channels=5)
    assert_same(SELECTIVE.run(inputs), exact("selective_scan", inputs))


def test_blocks_are_taken_together_only_where_programs_are_many():
    assert launch.blocks_together(group_size=1536, block_d=4, programs=10**6) == 32
    assert launch.blocks_together(group_size=1536, block_d=4, programs=3 * launch.ENOUGH_PROGRAMS) == 2
    assert launch.blocks_together(group_size=1536, block_d=4, programs=10) == 1
    assert launch.blocks_together(group_size=3, block_d=4, programs=10**6) == 1


def test_offsets_of_a_selective_scan_past_2_31_elements(monkeypatch):
    """Every framewise input and the output's gradient with frames 2^30 elements apart; only touched pages exist."""
    short_chunks(monkeypatch)
    far = torch.empty(2**31 + 256, dtype=torch.float16, device=TRITON_DEVICE)
    inputs = of(SELECTIVE, 3, channels=4, d_state=2)
    inputs = {name: v.to(TRITON_DEVICE, torch.float16 if is_framewise(name) else v.dtype) for name, v in inputs.items()}
    gradient = torch.randn(1, 3, 4, device=TRITON_DEVICE).half()
    views = {}
    for number, (name, v) in enumerate({**inputs, "gradient": gradient}.items()):
        if is_framewise(name) or name == "gradient":
            views[name] = far.as_strided(v.shape, (1, 2**30, *((1, 3) if v.dim() == 4 else (3,))), 20 * number)
            views[name].copy_(v)
    far_gradient, results = views.pop("gradient"), []
    for values, dy, backend in ((inputs | views, far_gradient, "triton"), (inputs, gradient, "naive")):
        leaves = {name: v.detach().requires_grad_() for name, v in values.items()}
        y = call("selective_scan", leaves, backend)["y"]
        results.append(
            {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
        )
    assert_same(*results, TOLERANCE["float16"])


@BOTH_WAYS
def test_tiles_smaller_than_the_filter(reverse, monkeypatch):
    """Several programs of several tiles, and several blocks of channels, the last of each only partly filled."""
    set_tiles(monkeypatch, frames=2, channels=4, tiles=2)
    inputs = of(CONV, 7)
    assert_same(
        CONV.run(inputs, torch.tensor([6]), reverse=reverse),
        exact("short_conv", inputs, torch.tensor([6]), reverse=reverse),
    )


def test_offsets_of_a_convolution_past_2_31_elements(monkeypatch):
    """Two frames 2^31 elements apart, and channels in the second half of them; only the touched pages exist."""
    set_tiles(monkeypatch, frames=16, channels=8, tiles=1)
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=TRITON_DEVICE)
    x, dy = (far.as_strided((1, 2, 4), (1, 2**31, 3), start).requires_grad_() for start in (0, 20))
    values = torch.randn(2, 2, 4, device=TRITON_DEVICE).half()
    with torch.no_grad():
        x[0], dy[0] = values[0], values[1]
    weight, state = (
        torch.randn(4, 3, device=TRITON_DEVICE, requires_grad=True),
        torch.zeros(1, 4, 2, device=TRITON_DEVICE),
    )
    found = []
    for backend, leaf, gradient in (
        ("triton", x, dy.detach()),
        ("naive", values[:1].clone().requires_grad_(), values[1:]),
    ):
        y = call("short_conv", {"x": leaf, "weight": weight, "initial_state": state}, backend)["y"]
        found.append(
            dict(
                zip(("y", "x", "weight"), (y.detach(), *torch.autograd.grad(y, (leaf, weight), gradient)), strict=True)
            )
        )
    assert_same(*found, TOLERANCE["float16"])


@pytest.mark.parametrize(
    ("way", "sizes", "said"),
    [
        (ONE, {"head_dim": 67, "d_state": 16}, "head_dim 67 and d_state 16.*backend='torch'"),
        (PAIR, {"head_dim": 16, "d_state": 129}, "head_dim 16 and d_state 129.*backend='torch'"),
        (DELTA, {"d_state": 129}, "go to d_state 128, got 129: pass backend='torch'"),
        (SELECTIVE, {"d_state": 257}, "go to d_state 256, got 257: pass backend='torch'"),
        (CONV, {"taps": 17}, "go to 16 taps, got 17: pass backend='torch'"),
    ],
    ids=lambda v: str(v) if isinstance(v, Way) else "",
)
def test_sizes_beyond_the_limits_are_refused_by_name(way, sizes, said):
    with pytest.raises(ValueError, match=f"^backend: {way.op} cannot run with 'triton' here: .*{said}"):
        way.call({name: v.to(way.device) for name, v in of(way, 1, **sizes).items()})


@pytest.mark.slow
def test_warmups_run_every_direction(monkeypatch):
    set_tiles(monkeypatch, frames=16, channels=8, tiles=1)
    short_chunks(monkeypatch)
    warmup_ssd(1, 4, 1, 4, torch.float16, TRITON_DEVICE)
    warmup_selective_scan(1, 1, dtype=torch.float16, device=TRITON_DEVICE)
    small_tiles(monkeypatch)
    warmup_gated_delta(1, 4, 1, 4, torch.float16, TRITON_DEVICE)
    warmup_short_conv(8, dtype=torch.float16, device=TRITON_DEVICE, padded=(False, True))


@pytest.mark.slow  # a Python process of its own
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
def test_the_interpreter_is_mended_by_importing_the_kernels():
    """A loop over chunks ends, in a process that nobody else has prepared."""
    code = (
        "import torch; from cald_speech.ops import ssd\n"
        "x, dt, A, B = torch.ones(1, 9, 1, 1), torch.ones(1, 9, 1), -torch.ones(1), torch.ones(1, 9, 1, 1)\n"
        "assert torch.allclose(*(ssd(x, dt, A, B, B, backend=name) for name in ('triton', 'naive')))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
