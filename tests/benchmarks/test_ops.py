"""The benchmark of the ops: what it refuses to print, what it measures, and that peers compute what we compute."""

import json
import time
from dataclasses import replace

import pytest
import torch

from cald_speech.benchmarks import bars, contest, ops, stopwatch
from cald_speech.benchmarks.bars import Bar
from cald_speech.benchmarks.cases import OPS, Case, make_inputs
from cald_speech.benchmarks.contest import cells, contestants, parity_fault, run_case
from cald_speech.benchmarks.peers import CHUNK_SIZES
from cald_speech.benchmarks.stopwatch import CLEAR, Limits, OutOfMemory, OutOfTime, cpu_peak, measure_in_turns
from cald_speech.ops.backends import Backend
from cald_speech.ops.short_conv.naive import short_conv_naive
from tests.helpers import NO_NATIVE

MIB = 2**20
ANY_LIMITS = Limits(1e9, {torch.float32: 1e9, torch.bfloat16: 1e9})
TINY = Case("short_conv", batch=1, num_frames=20, heads=1, groups=1)
needs_linux = pytest.mark.skipif(not CLEAR.exists(), reason="resident peaks need Linux's /proc/self/clear_refs")


def a_little_wrong(x, *arguments, **options):
    """The convolution, a hundredth too large."""
    made = short_conv_naive(x, *arguments, **options)
    return (made[0] * 1.01, made[1]) if options["return_final_state"] else made * 1.01


def unable(*arguments, **options):
    raise TypeError("a kernel that does not compile")


def too_large(*arguments, **options):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried ...")


@pytest.fixture
def with_backend(monkeypatch):
    """The convolution with one more backend, a function of this module; memory is not measured."""

    def add(function):
        monkeypatch.setitem(OPS["short_conv"].backends, "new", Backend(__name__))
        monkeypatch.setitem(globals(), "short_conv_new", function)
        monkeypatch.setattr(contest, "cpu_peak", lambda *arguments, **options: 0)
        contest.parity_of.cache_clear()

    yield add
    contest.parity_of.cache_clear()


@pytest.mark.parametrize(
    ("function", "status"),
    [
        (a_little_wrong, "refused: parity failed: output is off by 1.0e-02"),
        (unable, "failed: TypeError: a kernel that does not compile"),
        (too_large, "out of memory: [enforce fail"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_no_speed_without_parity(with_backend, function, status):
    with_backend(function)
    rows = {row.name: row for row in run_case(TINY, ANY_LIMITS, seconds=0, peers=False)}
    assert rows["new"].status.startswith(status) and rows["new"].timing is None
    assert "median_s" not in rows["new"].as_json() and rows["new"].status in cells(rows["new"])
    assert rows["torch"].status == "ok" and rows["torch"].timing.median_s > 0


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, torch.float32) for op in OPS if op != "ssd"] + [("ssd", torch.bfloat16)],
    ids=lambda v: v if isinstance(v, str) else str(v).removeprefix("torch."),
)
def test_our_backends_pass_parity(op, dtype):
    """What the contract of tests/ops asks of them, by the benchmark's own check."""
    case = Case(op, batch=1, num_frames=1, heads=2, groups=2, dtype=dtype, head_dim=8, d_state=8)
    names = set(contestants(case, peers=False)) - {"naive"}
    assert names and {name: fault for name in names if (fault := parity_fault(case, name))} == {}


def test_turns_alternate():
    ran = []
    measure_in_turns({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=3, warmup=1)
    assert "".join(ran) == "ab" + "ab" + "ba" + "ab"


def test_gradients_are_of_every_input():
    case = replace(TINY, op="ssd", backward=True)
    assert all(v.requires_grad for v in make_inputs(case).values())
    assert not any(v.requires_grad for v in make_inputs(replace(case, backward=False)).values())


# Run in the forked process, which imports this module.
def hold(mib):
    """A call that holds so many MiB in large and small blocks, then frees them and holds a tenth."""

    def call():
        blocks = [torch.ones(size) for size in (MIB // 4, 20_000) for _ in range(mib * MIB // 8 // size)]
        del blocks
        return torch.ones(mib * MIB // 40)

    return lambda: torch.ones(10) @ torch.ones(10), call


def take_all():
    return lambda: None, lambda: torch.ones(2**44)


def take_long():
    return lambda: None, lambda: time.sleep(100)


def fail():
    return lambda: None, lambda: torch.ones(2) @ torch.ones(3)


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("mib", [20, 200])
def test_peak_memory_is_what_was_held(mib):
    held = sum(mib * MIB // 8 // size * size * 4 for size in (MIB // 4, 20_000)) / MIB
    assert abs(cpu_peak(hold, mib) / MIB - held) < 0.05 * held + 2


@pytest.mark.slow  # processes of their own
@needs_linux
def test_what_cannot_be_measured_is_told_apart():
    with pytest.raises(OutOfMemory, match=r"needs more than .* GiB: .*allocate memory"):
        cpu_peak(take_all)
    with pytest.raises(OutOfTime, match=r"more than 0\.5 s"):
        cpu_peak(take_long, longest_s=0.5)
    with pytest.raises(RuntimeError, match="traceback stands above"):
        cpu_peak(fail)


@pytest.fixture
def small_machine(monkeypatch):
    """Limits measured on little, so that a run takes seconds."""
    monkeypatch.setitem(stopwatch.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(stopwatch.MATRIX_SIZE, "cpu", 64)


@pytest.mark.slow
@needs_linux
def test_prints_a_table_and_last_a_line_of_json(small_machine, capsys):
    options = ["--sizes", "1x20", "--widths", "64", "--seconds", "0", "--groups", "1,heads", "--longest", "60"]
    ops.main(["--device", "cpu", "--ops", "ssd,short_conv", *options])
    *_, last = lines = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert len([line for line in lines if line.startswith(("ssd ", "short_conv "))]) == len(rows)
    left_out = [row for row in rows if row["status"] != "ok"]
    assert all(row["status"].startswith("left out") and row["kind"] == "peer" for row in left_out), left_out
    rows = [row for row in rows if row["status"] == "ok"]
    names = {row["name"] for row in (*rows, *left_out) if row["op"] == "ssd"}
    ours = {"torch", "naive"} | (set() if NO_NATIVE else {"native"})
    assert names == {*ours, *(f"transformers, chunks of {n}" for n in CHUNK_SIZES)}
    for row in rows:
        assert row["median_s"] > 0 and row["spread_s"] >= 0 and row["repeats"] >= 3 and row["peak_mib"] >= 0
        assert row["of_limit"] == pytest.approx(row["least_s"] / row["median_s"], rel=1e-2)
        assert row["kind"] == "peer" or row["time_over"]
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}


@pytest.mark.parametrize(
    "options", [["--ops", "attention"], ["--dtypes", "int8"], ["--directions", "up"], ["--device", "meta"]]
)
def test_wrong_options_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        ops.parse(options)
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bar", "held"),
    [
        (Bar("", 0.3, 0.35), True),
        (Bar("", 0.4, 0.35), False),
        (Bar("", 0.4, 0.35, at_most=False), True),
        (Bar("", None, 0.35, reason="no peer"), False),
        (Bar("", float("nan"), 0.35), False),
    ],
)
def test_bars(bar, held):
    assert bar.held is held and str(bar).startswith("held" if held else "NOT HELD")


OF_SCANS, OF_DELTA = [0.35, 0.25, 0.5, 0.25, 0.5, 0.25, 0.65, 0.25, 7, 1.3, 1.1, 2.0], [0.3, 0.25, 1.5, 0.4, 0.25, 1.5]


@pytest.mark.slow  # every case of every bar is timed
@pytest.mark.parametrize(
    ("options", "limits"), [([], OF_DELTA + OF_SCANS), (["--ops", "gated_delta"], OF_DELTA)], ids=["all", "of one op"]
)
def test_bars_are_printed_one_by_one(options, limits, small_machine, monkeypatch, capsys):
    monkeypatch.setattr(contest, "cpu_peak", lambda *arguments, **options: MIB)
    monkeypatch.setattr(contest, "parity_fault", lambda *arguments: None)  # it has its own tests
    monkeypatch.setattr(bars, "CPU_CASE", replace(bars.CPU_CASE, num_frames=40))
    monkeypatch.setattr(bars, "DELTA_CASE", replace(bars.DELTA_CASE, num_frames=40))
    monkeypatch.setattr(bars, "TEN_MINUTES", 64)
    monkeypatch.setattr(bars, "HOUR", 128)
    monkeypatch.setattr(bars, "RUN_SECONDS", 0)
    ops.main(["--device", "cpu", "--bars", *options])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert len(found) == len(lines)
    assert all(bar["figure"] > 0 for bar in found)
    assert [bar["limit"] for bar in found] == limits


def test_the_old_option_says_its_new_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        ops.main(["--must-show"])
    assert "--must-show is called --bars now" in capsys.readouterr().err
