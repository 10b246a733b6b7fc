"""The compiled kernels: how they come to be and what is said where they cannot; vectors, threads, strides, offsets."""

import ctypes
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from cald_speech.benchmarks.cases import OPS, Case
from cald_speech.benchmarks.cases import make_inputs as make_case_inputs
from cald_speech.ops import ssd, ssd_bidirectional
from cald_speech.ops.backends import Request, why_not_native
from cald_speech.ops.native import compiler
from cald_speech.ops.native.call import Strided, check_fields
from cald_speech.ops.native.compiler import NotBuilt
from cald_speech.ops.selective_scan import native as selective_scan_kernels
from cald_speech.ops.short_conv import native as short_conv_kernels
from cald_speech.ops.ssd import native as ssd_kernels
from tests.helpers import TOLERANCE, needs_native, relative_error

pytestmark = needs_native


def make_inputs(num_frames, *, batch=2, heads=4, head_dim=8, groups=2, d_state=16):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "x": randn(batch, num_frames, heads, head_dim),
        "dt": F.softplus(randn(batch, num_frames, heads) - 2),
        "A": -torch.rand(heads, generator=g).mul(3).exp() / 4,
        "B": randn(batch, num_frames, groups, d_state),
        "C": randn(batch, num_frames, groups, d_state),
        "D": randn(heads),
    }


def gradients(inputs, dy=None, **options):
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y = ssd(**leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y) if dy is None else dy)]


def assert_same(actual, expected):
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) <= TOLERANCE["parity"], errors


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 256])
@pytest.mark.parametrize(("head_dim", "d_state"), [(1, 1), (16, 16), (17, 31), (64, 128), (80, 64), (130, 5)])
def test_every_size(head_dim, d_state, chunk_size):
    """Whole vectors and part of one, one tile and many, blocks of one chunk and of sixteen."""
    inputs = make_inputs(290, batch=1, heads=2, head_dim=head_dim, groups=1, d_state=d_state)
    assert_same(
        gradients(inputs, backend="native", chunk_size=chunk_size), gradients(inputs, backend="torch", chunk_size=32)
    )


@pytest.mark.parametrize("heads", [1, 3, 7])
def test_any_number_of_threads(heads):
    """A group's heads are parted by it: shares of unequal size, and their sums for B and C."""
    inputs, found = make_inputs(70, batch=1, heads=heads, groups=1), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(inputs, backend="native"))
            assert all(map(torch.equal, found[-1], gradients(inputs, backend="native"))), "the same call, other bits"
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])


def test_decays_to_the_last_bits():
    """A state after one frame is exp(dt A) of itself, from none to total forgetting; never above 1."""
    steps = torch.linspace(1e-6, 200, 4001)[:, None, None]
    nothing, state = torch.zeros(len(steps), 1, 1, 1), torch.ones(len(steps), 1, 1, 1)
    _, decayed = ssd(
        nothing, steps, -torch.ones(1), nothing, nothing, initial_state=state, return_final_state=True, backend="native"
    )
    exact, decayed = torch.exp(-steps.double()).flatten(), decayed.double().flatten()
    normal = exact > 2.0**-126
    # The exponent is a float32: its rounding counts as often as it is large.
    allowed = exact * (2e-7 + 6e-8 * steps.double().flatten())
    assert ((decayed - exact).abs() <= allowed)[normal].all() and not decayed[exact < 2.0**-127].any()
    assert decayed.max() <= 1


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D"])
def test_nothing_hides_a_nan(name):
    """Where the recurrence has one, so have the kernels; within a chunk earlier frames may have it too."""
    inputs = make_inputs(40)
    inputs[name].view(-1)[0] = torch.nan
    expected = ssd(**inputs, backend="naive").isnan()
    assert expected.any() and ssd(**inputs, backend="native").isnan()[expected].all()


def test_slices_of_wider_tensors_and_an_expanded_gradient():
    inputs = make_inputs(40)
    wide = {name: torch.randn(*v.shape[:-1], v.size(-1) + 3) for name, v in inputs.items() if v.dim() > 1}
    sliced = dict(inputs)
    for name, v in wide.items():
        v[..., 2:-1] = inputs[name]
        sliced[name] = v[..., 2:-1]
    sliced["B"] = inputs["B"].transpose(1, 3).contiguous().transpose(1, 3)
    dy = torch.ones(1, 1, 1, 1).expand_as(inputs["x"])
    assert_same(gradients(sliced, dy, backend="native"), gradients(inputs, backend="torch"))


@pytest.mark.parametrize("op", ["ssd", "ssd_bidirectional", "selective_scan", "short_conv"])
@pytest.mark.parametrize("default", ["dtype", "device"])
def test_the_process_s_defaults_change_nothing(op, default):
    """Kernels write float32 into the CPU's memory: nothing they are given may follow torch's defaults."""
    case = Case(op, batch=2, num_frames=40, heads=2, groups=1, backward=True)
    inputs, function = make_case_inputs(case), partial(OPS[op].function, backend="native")
    expected = [y := function(**inputs), *torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))]
    before = torch.get_default_dtype()
    try:
        if default == "dtype":
            torch.set_default_dtype(torch.float64)
        with torch.device("meta" if default == "device" else "cpu"):
            actual = [y := function(**inputs), *torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))]
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, actual, expected)) and {v.dtype for v in actual} == {torch.float32}


def test_what_kernels_write_to_is_never_a_copy():
    inputs = make_inputs(20)
    with pytest.raises(ValueError, match=r"^y: expected float32 on the CPU .*, got torch.float64 on cpu"):
        ssd_kernels.ssd_into_native(inputs["x"].double(), *inputs.values())


def test_offsets_past_two_to_the_31():
    """Sequences 2^31 elements apart, in memory that is only touched where they lie."""
    inputs, apart = make_inputs(20), 2**31 + 8
    far = torch.empty(apart + inputs["x"][0].numel()).as_strided(inputs["x"].shape, (apart, 32, 8, 1))
    far.copy_(inputs["x"])
    assert torch.equal(ssd(**inputs | {"x": far}, backend="native"), ssd(**inputs, backend="native"))


def test_both_directions_with_an_unused_state():
    inputs = make_inputs(70)
    inputs |= {"dt": torch.stack([inputs["dt"], inputs["dt"] / 2], dim=2), "A": torch.stack([inputs["A"]] * 2)}
    found = []
    for backend in ("native", "torch"):
        leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
        y = ssd_bidirectional(**leaves, lengths=torch.tensor([70, 33]), backend=backend)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    assert_same(*found)


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # it tells what it does not look into
def test_within_a_compiled_function():
    inputs = make_inputs(20)
    compiled = torch.compile(lambda x: 2 * ssd(**inputs | {"x": 2 * x}, backend="native"), backend="eager")
    assert torch.equal(compiled(inputs["x"]), 2 * ssd(**inputs | {"x": 2 * inputs["x"]}, backend="native"))


STRUCTURES = {
    "cald_tensor": Strided,
    "cald_ssd": ssd_kernels._Scan,
    "cald_selective_scan": selective_scan_kernels._Selective,
    "cald_short_conv": short_conv_kernels._Convolution,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_c_and_python_agree_on_every_field(name):
    check_fields(STRUCTURES[name], name)


def swapped(fields):
    return [fields[1], fields[0], *fields[2:]]


def renamed(fields):
    return [fields[0], ("other", fields[1][1]), *fields[2:]]


def narrower(fields):
    return [(fields[0][0], ctypes.c_int32), *fields[1:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swapped, r"C has batch \(8 bytes at 0\) where Changed has frames \(8 bytes at 0\)"),
        (renamed, r"C has frames \(8 bytes at 8\) where Changed has other \(8 bytes at 8\)"),
        (narrower, r"C has batch \(8 bytes at 0\) where Changed has batch \(4 bytes at 0\)"),
        (lambda fields: fields[:-1], r"C has dC \(32 bytes at .*\) where Changed has no more"),
        (lambda fields: [*fields, ("extra", ctypes.c_int64)], r"C has no more .* where Changed has extra"),
    ],
    ids=["swapped", "renamed", "another type", "one less", "one more"],
)
def test_a_changed_field_is_named(change, said):
    changed = type("Changed", (ctypes.Structure,), {"_fields_": change(ssd_kernels._Scan._fields_)})
    with pytest.raises(RuntimeError, match=f"^cald_ssd: {said}"):
        check_fields(changed, "cald_ssd")


def test_it_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CALD_SPEECH_CACHE", str(tmp_path / "new"))
    compiler.build()
    (kept,) = (tmp_path / "new").iterdir()
    monkeypatch.setattr(compiler, "compile_to", lambda *arguments: pytest.fail("compiled again"))
    compiler.build()
    assert kept.suffix == ".so"


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("CC", "no-such-compiler", "It needs a C compiler, and CC names none: no-such-compiler"),
        ("PATH", "", "It needs a C compiler, and there is none"),
        ("CC", "false", "false .* failed"),
        ("CC", f"{sys.executable}", "failed: .*"),
        ("CALD_SPEECH_CACHE", "/dev/null/cache", "It has nowhere to be kept .* set CALD_SPEECH_CACHE"),
        ("CALD_SPEECH_CACHE", "/proc", "It cannot be kept in /proc"),
    ],
)
def test_why_it_cannot_be_had(setting, value, said, tmp_path, monkeypatch):
    monkeypatch.setenv("CALD_SPEECH_CACHE", str(tmp_path))
    if setting == "PATH":
        monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(setting, value)
    with pytest.raises(NotBuilt, match=said):
        compiler.build()
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("CALD_SPEECH_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_to", lambda path, command: path.write_text("no library"))
    with pytest.raises(NotBuilt, match=r"cannot be loaded .*: remove it to try again"):
        compiler.build()


def test_without_it_auto_is_torch_and_asking_for_it_says_why(monkeypatch):
    monkeypatch.setenv("CALD_SPEECH_NATIVE", "0")
    inputs = make_inputs(20)
    assert torch.equal(ssd(**inputs), ssd(**inputs, backend="torch"))
    with pytest.raises(ValueError, match=r"ssd cannot run with 'native' here: CALD_SPEECH_NATIVE=0 .*backend='torch'"):
        ssd(**inputs, backend="native")


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(torch.device("cuda"), torch.float32), "it is compiled for CPUs, and the tensors are on cuda"),
        (Request(torch.device("cpu"), torch.bfloat16), "its arithmetic is float32, and the input is torch.bfloat16"),
    ],
)
def test_what_it_does_not_run(request_, said):
    assert said in why_not_native(request_)


def test_a_process_that_imports_the_package_does_not_compile(tmp_path):
    code = "import cald_speech.ops, os; assert not os.listdir(os.environ['CALD_SPEECH_CACHE'])"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"CALD_SPEECH_CACHE": str(tmp_path)})
