"""The compiled kernels: sizes, threads, numbers to the last bits, what they share with Python, how they come to be."""

import ctypes
import os
import shutil
import sys

import pytest
import torch
from torch.nn import functional as F

from cald_speech.benchmarks.cases import OPS, Case
from cald_speech.benchmarks.cases import make_inputs as make_case_inputs
from cald_speech.ops import short_conv, ssd
from cald_speech.ops.backends import Request, why_not_native
from cald_speech.ops.gated_delta import native as gated_delta_kernels
from cald_speech.ops.native import compiler
from cald_speech.ops.native.call import Strided, check_fields
from cald_speech.ops.native.kept import NotBuilt
from cald_speech.ops.selective_scan import native as selective_scan_kernels
from cald_speech.ops.short_conv import native as short_conv_kernels
from cald_speech.ops.ssd import native as ssd_kernels
from tests.helpers import TOLERANCE, needs_native, relative_error
from tests.ops.cases import assert_same, bits_differ, call, make_inputs, run

pytestmark = needs_native
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
NATIVE_OPS = pytest.mark.parametrize("op", ["ssd", "ssd_bidirectional", "selective_scan", "gated_delta", "short_conv"])


def assert_as_torch(op, inputs, *, chunk_size=None, **options):
    """Both have the numbers of the recurrence (test_contract.py); this one is faster to compare with."""
    sized = {} if chunk_size is None else {"chunk_size": chunk_size}
    assert_same(run(op, inputs, "native", **sized, **options), run(op, inputs, "torch", **options))


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 256])
@pytest.mark.parametrize(("head_dim", "d_state"), [(1, 1), (16, 16), (17, 31), (64, 128), (80, 64), (130, 5)])
def test_every_size_of_an_ssd(head_dim, d_state, chunk_size):
    """Whole vectors and part of one, one tile and many, blocks of one chunk and of sixteen."""
    inputs = make_inputs("ssd", 290, batch=1, heads=2, head_dim=head_dim, groups=1, d_state=d_state)
    assert_as_torch("ssd", inputs, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("channels", "groups", "d_state"), [(1, 1, 1), (64, 1, 16), (200, 1, 3), (130, 2, 16), (5, 5, 300)]
)
def test_every_size_of_a_selective_scan(channels, groups, d_state):
    """Whole strips and part of one, in every group; blocks of 64 frames and, for large states, of 16."""
    assert_as_torch(
        "selective_scan",
        make_inputs("selective_scan", 130, batch=1, channels=channels, groups=groups, d_state=d_state),
    )


@pytest.mark.parametrize("per_channel", [False, True], ids=["a decay per head", "per channel"])
@pytest.mark.parametrize(("chunk_size", "head_dim", "d_state"), [(16, 1, 1), (64, 17, 31), (32, 64, 128), (256, 80, 5)])
def test_every_size_of_a_gated_delta(chunk_size, head_dim, d_state, per_channel):
    """Whole vectors and part of one, one tile and many, blocks of one chunk and of sixteen."""
    sizes = {"batch": 1, "heads": 2, "groups": 1, "head_dim": head_dim, "d_state": d_state, "per_channel": per_channel}
    assert_as_torch("gated_delta", make_inputs("gated_delta", 290, **sizes), chunk_size=chunk_size)


@pytest.fixture
def small_tasks(monkeypatch):
    """Many blocks, strips and threads already at a test's sizes."""
    for name, value in {"FRAMES_PER_TASK": 16, "STRIP_CHANNELS": 16, "ELEMENTS_PER_THREAD": 1}.items():
        monkeypatch.setattr(short_conv_kernels, name, value)


@DIRECTIONS
@pytest.mark.parametrize("taps", [1, 3, 4, 18])
@pytest.mark.parametrize("channels", [1, 16, 35, 64])
def test_every_size_of_a_convolution(channels, taps, reverse, small_tasks):
    """Whole vectors and part of one; blocks and tiles, the last one whole or not; filters longer than a block."""
    inputs = make_inputs("short_conv", 70, channels=channels, taps=taps)
    for lengths, activation in (((70, 37, 2), "silu"), ((64, 32, 0), "identity"), ((17, 16, 15), "silu")):
        options = {"lengths": torch.tensor(lengths), "reverse": reverse, "activation": activation}
        assert_as_torch("short_conv", inputs, **options)


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("ssd", {"heads": 1}),
        ("ssd", {"heads": 3}),
        ("ssd", {"heads": 7}),
        ("gated_delta", {"heads": 7}),
        ("gated_delta", {"heads": 3, "per_channel": True}),
        ("selective_scan", {"channels": 64}),
        ("selective_scan", {"channels": 200}),
        ("short_conv", {"channels": 40}),
    ],
    ids=str,
)
def test_any_number_of_threads(op, sizes, small_tasks):
    """A group's heads or strips are parted by it: shares of unequal size, and their sums for B and C."""
    inputs, found = make_inputs(op, 70, batch=1, groups=1, **sizes), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(op, inputs, "native"))
            assert bits_differ(run(op, inputs, "native"), found[-1]) == [], "the same call, other bits"
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])
        assert op != "short_conv" or bits_differ(other, found[0]) == []


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


def test_sums_over_an_hour_do_not_drift():
    """Each frame adds 0.1 to the bias' gradient: a float32 that runs on would be off by a thousandth."""
    num_frames = 360_000
    bias = torch.zeros(1, requires_grad=True)
    y = short_conv(torch.zeros(1, num_frames, 1), torch.ones(1, 2), bias, activation="identity", backend="native")
    y.backward(torch.full_like(y, 0.1))
    assert bias.grad.item() == pytest.approx(0.1 * num_frames, rel=1e-6)


def test_weights_of_another_dtype():
    inputs = make_inputs("short_conv", 20)
    leaves = {name: v if name == "x" else v.to(torch.bfloat16).requires_grad_() for name, v in inputs.items()}
    y = short_conv(**leaves, backend="native")
    expected = short_conv(**{name: v.detach().float() for name, v in leaves.items()}, backend="torch")
    y.sum().backward()
    assert relative_error(y, expected) <= TOLERANCE["rounding"]
    assert {leaves[name].grad.dtype for name in ("weight", "bias", "initial_state")} == {torch.bfloat16}


OF_SCANS, OF_DELTA = ("x", "dt", "A", "B", "C", "D"), ("q", "k", "v", "beta", "g")


@pytest.mark.parametrize(
    ("op", "sizes", "name"),
    [(op, {}, name) for op in ("ssd", "selective_scan") for name in OF_SCANS]
    + [("gated_delta", {"per_channel": each}, name) for each in (False, True) for name in OF_DELTA],
    ids=str,
)
def test_nothing_hides_a_nan(op, sizes, name):
    """Where the recurrence has one, so have the kernels, and nowhere else."""
    inputs = make_inputs(op, 40, **sizes)
    inputs[name].view(-1)[0] = torch.nan
    expected, actual = (call(op, inputs, backend)["y"].isnan() for backend in ("naive", "native"))
    assert expected.any() and torch.equal(actual, expected)


@NATIVE_OPS
def test_an_expanded_gradient(op):
    """That of a sum has no strides at all."""
    inputs, found = make_inputs(op, 40), []
    for backend in ("native", "torch"):
        leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
        y = call(op, leaves, backend)["y"]
        found.append(
            dict(zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values()), allow_unused=True), strict=True))
        )
    assert_same(*found)


@NATIVE_OPS
@pytest.mark.parametrize("default", ["dtype", "device"])
def test_the_process_s_defaults_change_nothing(op, default):
    """Kernels write float32 into the CPU's memory: nothing they are given may follow torch's defaults."""
    case = Case(op, batch=2, num_frames=40, heads=2, groups=1, backward=True)
    inputs, function = make_case_inputs(case), lambda **given: OPS[op].function(**given, backend="native")
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
    inputs = make_inputs("ssd", 20)
    with pytest.raises(ValueError, match=r"^y: expected float32 on the CPU .*, got torch.float64 on cpu"):
        ssd_kernels.ssd_into_native(inputs["x"].double(), *inputs.values())


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # it tells what it does not look into
@pytest.mark.parametrize("op", ["ssd", "short_conv"])
def test_within_a_compiled_function(op):
    inputs = make_inputs(op, 20)
    doubled = lambda x: 2 * call(op, inputs | {"x": 2 * x}, "native")["y"]  # noqa: E731
    assert torch.equal(torch.compile(doubled, backend="eager")(inputs["x"]), doubled(inputs["x"]))


STRUCTURES = {
    "cald_tensor": Strided,
    "cald_ssd": ssd_kernels._Scan,
    "cald_gated_delta": gated_delta_kernels._Delta,
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


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache of its own, for the smallest of the sources: what is tested here is how it is kept."""
    monkeypatch.setattr(compiler, "sources", lambda endings: [compiler.SHARED / "tensor.c"])
    monkeypatch.setenv("CALD_SPEECH_CACHE", str(tmp_path / "new"))
    return tmp_path / "new"


def test_it_is_compiled_once(place, monkeypatch):
    compiler.build()
    assert sorted(path.suffix for path in place.iterdir()) == [".sha256", ".so"]
    assert place.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compiler, "compile_to", lambda *arguments: pytest.fail("compiled again"))
    assert compiler.build().mended is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda library: os.truncate(library, library.stat().st_size // 2), "its digest is another"),
        (lambda library: library.write_bytes(bytes(library.stat().st_size)), "its digest is another"),
        (lambda library: library.with_suffix(".sha256").unlink(), "has no digest"),
        (lambda library: library.with_suffix(".sha256").write_bytes(b"\xff"), "has no digest"),
        (lambda library: library.chmod(0o777), "others than its owner may write to"),
    ],
    ids=["cut off", "zeroed", "no digest", "no text", "writable"],
)
def test_a_damaged_library_is_compiled_anew(place, spoil, said, caplog, tmp_path, monkeypatch):
    """It would end the process where it is touched: SIGBUS, SIGSEGV. In a copy, for the first is loaded here."""
    shutil.copytree(compiler.build().path.parent, tmp_path / "copy")
    monkeypatch.setenv("CALD_SPEECH_CACHE", str(tmp_path / "copy"))
    spoil(next((tmp_path / "copy").glob("*.so")))
    again = compiler.build()
    assert said in again.mended and said in caplog.text and again.library.cald_tensor_fields
    assert compiler.build().mended is None


def test_what_others_could_have_written_is_not_loaded(place, monkeypatch):
    compiler.build()
    for mode in (0o720, 0o702):
        place.chmod(mode)
        with pytest.raises(NotBuilt, match=r"not kept in .*, which others than its owner may write to.*chmod 700 "):
            compiler.build()
    place.chmod(0o755)
    compiler.build()
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    with pytest.raises(NotBuilt, match=r"not kept in .*, which belongs to user"):
        compiler.build()


def test_what_a_killed_compilation_leaves_is_removed(place):
    (place / "compiling-abc").mkdir(parents=True)
    compiler.build()
    assert not list(place.glob("compiling-*"))


def test_a_library_that_lacks_a_function(place, monkeypatch):
    compiler.build()
    monkeypatch.setattr(compiler, "symbols", lambda: ["cald_tensor_fields", "cald_ssd_forward"])
    with pytest.raises(NotBuilt, match=r"has no cald_ssd_forward: remove it"):
        compiler.build()


def test_the_names_of_all_functions():
    names = compiler.symbols()
    assert len(names) == 21 and {"cald_tensor_fields", "cald_ssd_backward", "cald_ssd_forward_scratch"} <= {*names}


@pytest.fixture
def fake_compiler(tmp_path):
    """Writes a shell script that takes a compiler's place, in a folder with a blank in its name."""
    path = tmp_path / "my tools" / "cc"
    path.parent.mkdir()

    def write(body):
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.mark.parametrize(
    "named", ["'{0}' cc", "{0}", '"{0}" "cc" -g0', "  "], ids=["two words", "blank", "quotes", "blanks"]
)
def test_how_a_compiler_is_named(named, place, fake_compiler, monkeypatch):
    path = fake_compiler('case "$1" in cc) shift;; esac; exec cc "$@"')
    monkeypatch.setenv("CC", named.format(path))
    assert compiler.build().library.cald_tensor_fields


def test_a_relative_cache(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALD_SPEECH_CACHE", "kernels here")
    assert compiler.build().path.parent == tmp_path / "kernels here"


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("CC", "no-such-compiler", "It needs a C compiler, and CC names none: no-such-compiler"),
        ("PATH", "", "It needs a C compiler, and there is none"),
        ("CC", "false", "false .* failed"),
        ("CC", "cc 'unclosed", "CC cannot be read as a command .*: cc 'unclosed"),
        ("CC", f"{sys.executable}", "failed: .*"),
        ("CALD_SPEECH_CACHE", "/dev/null/cache", "It has nowhere to be kept .* set CALD_SPEECH_CACHE"),
        ("CALD_SPEECH_CACHE", "/proc", "It (cannot be|is not) kept in /proc"),
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


def test_a_library_that_cannot_be_loaded(place, fake_compiler, monkeypatch):
    path = fake_compiler('while [ $# -gt 1 ]; do [ "$1" = -o ] && echo no library > "$2"; shift; done; echo 1.0')
    monkeypatch.setenv("CC", str(path))
    with pytest.raises(NotBuilt, match=r"cannot be loaded .*: remove it to try again"):
        compiler.build()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch has the runtime that clang compiles for")
def test_a_compiler_for_another_openmp_runtime_is_told(place, monkeypatch, tmp_path):
    source = tmp_path / "clang.c"
    source.write_text("void __kmpc_fork_call(void); void run(void) { __kmpc_fork_call(); }")
    monkeypatch.setattr(compiler, "sources", lambda endings: [source] if endings == "c" else [])
    monkeypatch.setattr(compiler, "fingerprint", lambda command: "clang")
    with pytest.raises(NotBuilt, match=r"__kmpc_fork_call.*: its compiler expects another OpenMP .*, so set CC to gcc"):
        compiler.build()


def test_without_it_auto_is_torch_and_asking_for_it_says_why(monkeypatch):
    monkeypatch.setenv("CALD_SPEECH_NATIVE", "0")
    inputs = make_inputs("ssd", 20)
    assert torch.equal(ssd(**inputs), ssd(**inputs, backend="torch"))
    with pytest.raises(ValueError, match=r"ssd cannot run with 'native' here: CALD_SPEECH_NATIVE=0 .*backend='torch'"):
        ssd(**inputs, backend="native")


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(torch.device("cuda"), torch.float32), "it is compiled for CPUs, and the tensors are on cuda"),
        (Request(torch.device("cpu"), torch.float64), "its arithmetic is float32, and the input is torch.float64"),
    ],
)
def test_what_it_does_not_run(request_, said):
    assert said in why_not_native(request_)
