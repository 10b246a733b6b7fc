"""One case, all who can run it: parity first, then memory, then time in turns; a row of the table for each.

*No speed without parity*: in the same run, before it is timed, every backend is compared with the float64 recurrence.
At small sizes with lengths (one of them 0) and without, in both directions, with a state before and after where the op
has one, and once over more frames than any backend's block: outputs, final state and the gradient of every input.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cald_speech.benchmarks.cases import OPS, Case, least_work, make_inputs, step
from cald_speech.benchmarks.peers import PEERS
from cald_speech.benchmarks.stopwatch import (
    Limits,
    OutOfMemory,
    OutOfTime,
    Timing,
    cpu_peak,
    cuda_peak,
    is_out_of_memory,
    measure_in_turns,
    seconds_of,
)

# The recurrence steps through the frames one by one: beyond so many it is timed only if it is asked for.
NAIVE_FRAMES = 500
WARM_UP_FRAMES = 100
CLEARLY_SLOWER = 1.6
# The largest difference allowed, as a fraction of the largest expected value: two float32 algorithms for one result,
# and the rounding of inputs, products and outputs in half precision. The tests' table holds the same.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# A peer need only compute the same function: mamba-ssm multiplies float32 in TF32.
PEER_TOLERANCE = 3e-2
LENGTHS = (150, 67, 0)
MANY_FRAMES = 577  # one sequence: the recurrence's backward pass is quadratic in the frames
COLUMNS = ("op", "case", "dtype", "pass", "by", "median ms", "spread", "peak MiB", "of limit", "time over peers'")


@dataclass
class Row:
    """A line of the table; without a timing, ``status`` says why there is none."""

    case: Case
    name: str
    kind: str
    status: str = "ok"
    timing: Timing | None = None
    peak_bytes: int | None = None
    least_s: float | None = None
    bound: str = ""
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def of_limit(self) -> float | None:
        return self.least_s / self.timing.median_s if self.timing else None

    def as_json(self) -> dict[str, Any]:
        case = self.case
        named = {"op": case.op, "batch": case.batch, "num_frames": case.num_frames, "width": case.width}
        named |= {"groups": case.groups, "dtype": str(case.dtype).removeprefix("torch."), "direction": case.direction}
        named |= {"name": self.name, "kind": self.kind, "status": self.status}
        if self.timing is None:
            return named
        named |= {"median_s": self.timing.median_s, "spread_s": self.timing.spread_s}
        named |= {"repeats": len(self.timing.seconds), "peak_mib": self.peak_bytes and self.peak_bytes / 2**20}
        named |= {
            "least_s": self.least_s,
            "bound": self.bound,
            "of_limit": self.of_limit,
            "time_over": {k: round(v, 4) for k, v in self.ratios.items()},
        }
        return {key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in named.items()}


@dataclass(frozen=True)
class Contestant:
    """A backend of ours or a peer: a call, the tensors it takes, and what is wrong with its results, if anything."""

    kind: str
    call: Callable[..., Tensor]
    prepare: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    fault: Callable[[], str | None]


def contestants(case: Case, backends: tuple[str, ...] = (), peers: bool = True) -> dict[str, Contestant]:
    """Who can run a case, by name; ``backends`` narrows ours down. Who cannot run here is not listed."""
    op, found = OPS[case.op], {}
    for name, backend in op.backends.items():
        # What a device's auto does not consider (Triton's interpreter on a CPU, say) is run where it is named.
        wanted = not backend.auto_on or case.request.device.type in backend.auto_on
        if name == "naive":
            wanted = case.batch * case.num_frames <= NAIVE_FRAMES
        if (name in backends if backends else wanted) and backend.why_not(case.request) is None:
            call = partial(op.function, backend=name)
            found[name] = Contestant("backend", call, dict, partial(parity_of, _kind(case), name))
    for name, peer in PEERS[case.op].items() if peers else ():
        if peer.why_not(case.request) is None:
            fault = partial(peer_parity_of, _kind(case), name) if peer.computes_the_op else lambda: None
            prepare = partial(_prepared, name)
            found[name] = Contestant("peer", peer.call, partial(prepare, case.op), fault)
    return found


def run_case(
    case: Case,
    limits: Limits,
    *,
    seconds: float,
    longest_s: float = 60.0,
    backends: tuple[str, ...] = (),
    peers: bool = True,
    all_variants: bool = False,
) -> list[Row]:
    """Every contestant's row, timed in turns for some ``seconds`` in all, three times at least.

    A peer's chunk sizes that two trials show to be far from its best are not repeated, except with ``all_variants``.
    On a CPU a contestant whose call takes more than ``longest_s``, with what leads up to it, is left out.
    """
    inputs = make_inputs(case)
    least_s, bound = limits.seconds(*least_work(case, inputs), case.dtype)
    rows, calls = {}, {}
    for name, one in contestants(case, backends, peers).items():
        call = step(one.call, one.prepare(inputs), backward=case.backward)
        status, peak = try_out(one, call, case, name, longest_s)
        rows[name] = Row(case, name, one.kind, status, peak_bytes=peak, least_s=least_s, bound=bound)
        if status == "ok":
            calls[name] = call
    first = {name: min(seconds_of(call, device=case.device) for _ in range(2)) for name, call in calls.items()}
    for name, slower in slow_variants({} if all_variants else first).items():
        rows[name].status = slower
        del calls[name], first[name]
    repeats = max(3, min(25, int(seconds / sum(first.values())))) if first else 0
    timings = measure_in_turns(calls, repeats=repeats, warmup=0, device=case.device)
    peers_timings = {name: timing for name, timing in timings.items() if rows[name].kind == "peer"}
    for name, timing in timings.items():
        rows[name].timing = timing
        rows[name].ratios = {peer: timing.ratio_to(theirs) for peer, theirs in peers_timings.items() if peer != name}
    return list(rows.values())


def slow_variants(first: Mapping[str, float]) -> dict[str, str]:
    """Of peers that differ in an option alone ("name, option") those that are clearly not the best one, and why.

    Example
    -------
    >>> slow_variants({"ours": 9.0, "theirs, chunks of 64": 1.0, "theirs, chunks of 128": 2.0, "theirs, new": 1.2})
    {'theirs, chunks of 128': 'left out: 2.0 times as slow as theirs, chunks of 64 in two trials'}
    """
    slow = {}
    for name, time_s in first.items():
        siblings = [other for other in first if "," in other and other.split(",")[0] == name.split(",")[0]]
        best = min(siblings, key=first.get, default=name)
        if time_s > CLEARLY_SLOWER * first[best]:
            slow[name] = f"left out: {time_s / first[best]:.1f} times as slow as {best} in two trials"
    return slow


def try_out(
    one: Contestant, call: Callable[[], object], case: Case, name: str, longest_s: float
) -> tuple[str, int | None]:
    """Parity and peak memory (on a GPU after a call that compiles): ``ok`` with the peak, or what is wrong."""
    try:
        if fault := one.fault():
            return f"refused: parity failed: {fault}", None
        if case.device == "cpu":
            peak = cpu_peak(prepare_for_peak, case, name, longest_s=longest_s)
            if peak is None:
                call()
        else:
            call()
            peak = cuda_peak(call, case.device)
    except OutOfMemory as error:
        return f"out of memory: {error}", None
    except OutOfTime as error:
        return f"left out: {error} (--longest allows more)", None
    except failures() as error:
        said = (str(error).splitlines() or [""])[0]
        return f"{'out of memory' if is_out_of_memory(error) else f'failed: {type(error).__name__}'}: {said}", None
    return "ok", peak


@cache
def failures() -> tuple[type[Exception], ...]:
    """What a backend or a peer that does not work here raises, in its kernels, its sizes or its imports.

    It costs its own row then, not the run: time on a GPU is dear.
    """
    of_triton = [importlib.import_module("triton.errors").TritonError] if importlib.util.find_spec("triton") else []
    return (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError, *of_triton)


def prepare_for_peak(case: Case, name: str) -> tuple[Callable, Callable]:
    """For :func:`cald_speech.benchmarks.stopwatch.cpu_peak`: a contestant's step at a small size, and at the case's."""
    small = replace(case, batch=1, num_frames=min(case.num_frames, WARM_UP_FRAMES))
    one = contestants(case, backends=tuple(OPS[case.op].backends))[name]
    frame, *calls = (
        step(one.call, one.prepare(make_inputs(c)), backward=case.backward)
        for c in (replace(small, num_frames=1), small, case)
    )
    frame()  # what a first call imports stays in memory, and is not the op's
    return tuple(calls)


@cache
def parity_of(kind: Case, backend: str) -> str | None:
    return parity_fault(kind, backend)


@cache
def peer_parity_of(kind: Case, name: str) -> str | None:
    peer = PEERS[kind.op][name]
    return peer_fault(kind, lambda inputs: peer.call(**_prepared(name, kind.op, inputs)), peer.lacks)


def _prepared(name: str, op: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    peer = PEERS[op][name]
    return peer.prepare({key: v for key, v in inputs.items() if key not in peer.lacks})


def _kind(case: Case) -> Case:
    """What parity depends on: neither the length nor the width nor the direction."""
    return replace(case, batch=1, num_frames=1, heads=2, groups=min(case.groups, 2), backward=False)


def parity_fault(case: Case, backend: str) -> str | None:
    """What a backend gets wrong at a small size of the case's kind, in words, or None.

    Example
    -------
    >>> parity_fault(Case("short_conv", batch=1, num_frames=10, heads=2, groups=1), "torch") is None
    True
    """
    small = _small(case)
    checks = [(small, LENGTHS, False), (replace(small, batch=1, num_frames=MANY_FRAMES), None, False)]
    if OPS[case.op].carries:
        checks += [(small, LENGTHS, True), (small, None, True)]
    for check in checks:
        inputs, options, expected = reference(*check)
        actual = outputs_and_gradients(OPS[case.op].function, inputs, backend=backend, **options)
        if fault := first_fault(actual, expected, TOLERANCE[case.dtype]):
            size, lengths, reverse = check
            return f"{fault} (T {size.num_frames}, lengths {lengths}{', in reverse' if reverse else ''})"
    return None


@cache
def reference(
    case: Case, lengths: tuple[int, ...] | None, reverse: bool
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """The inputs and options of a check and what they give in float64, computed once for all backends."""
    op, inputs = OPS[case.op], make_inputs(case)
    if op.carries:
        _, state = op.function(**inputs, return_final_state=True, backend="naive")
        inputs["initial_state"] = torch.randn_like(state).requires_grad_()
    options = {"lengths": None if lengths is None else torch.tensor(lengths, device=case.device)}
    options |= {"reverse": reverse} if op.carries else {}
    exact = {name: v.detach().double().requires_grad_() for name, v in inputs.items()}
    expected = outputs_and_gradients(op.function, exact, backend="naive", **options)
    return inputs, options, {name: v.detach() for name, v in expected.items()}


def peer_fault(case: Case, call: Callable[..., Tensor], lacks: tuple[str, ...]) -> str | None:
    """The same for a peer's output, with neither lengths nor direction; ``lacks`` are inputs that it does not take."""
    inputs = {name: v for name, v in make_inputs(replace(_small(case), backward=False)).items() if name not in lacks}
    exact = {name: v.double() for name, v in inputs.items()}
    expected = OPS[case.op].function(**exact, backend="naive")
    return first_fault({"output": call(inputs)}, {"output": expected}, PEER_TOLERANCE)


def outputs_and_gradients(function: Callable, inputs: Mapping[str, Tensor], **options) -> dict[str, Tensor]:
    """Output, final state where there is one, and the gradient of every input under fixed random weights of both."""
    carries = "initial_state" in inputs
    made = function(**inputs, **(options | ({"return_final_state": True} if carries else {})))
    outputs = made if carries else (made,)
    generator = torch.Generator().manual_seed(1)
    # Eighths, which every dtype holds exactly.
    weights = [torch.randint(-8, 9, v.shape, generator=generator).to(v.device, v.dtype) / 8 for v in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
    named = dict(zip(("output", "final state"), outputs, strict=False))
    return named | {f"gradient of {name}": v for name, v in zip(inputs, gradients, strict=True)}


def first_fault(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> str | None:
    """The first tensor that differs by more than the tolerance, and by how much.

    Example
    -------
    >>> first_fault({"output": torch.tensor([1.0, 2.1])}, {"output": torch.tensor([1.0, 2.0])}, 1e-2)
    'output is off by 5.0e-02 of its largest value, and 1.0e-02 is allowed'
    """
    for name, exact in expected.items():
        largest = exact.abs().max().clamp(min=1e-12)
        error = ((actual[name].double() - exact.double()).abs().max() / largest).item()
        if not error <= tolerance:  # NaN too
            return f"{name} is off by {error:.1e} of its largest value, and {tolerance:.1e} is allowed"
    return None


def _small(case: Case) -> Case:
    """Two heads, with one group or one each, in float64's reach."""
    groups = 1 if case.groups == 1 else 2
    return replace(case, batch=len(LENGTHS), num_frames=max(LENGTHS), heads=2, groups=groups, backward=True)


def size_of(case: Case) -> str:
    groups = f", {case.groups} group{'s' if case.groups > 1 else ''}" if case.op.startswith(("ssd", "gated")) else ""
    return f"{case.batch} x {case.num_frames:,} x {case.width}{groups}"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; where there is no time, the reason stands at its end."""
    case, name = row.case, str(row.case.dtype).removeprefix("torch.")
    start = (case.op, size_of(case), name, case.direction, row.name)
    if row.timing is None:
        return (*start, "-", "-", "-", "-", row.status)
    ratios = ", ".join(f"{ratio:.2f} {peer}" for peer, ratio in row.ratios.items()) if row.kind == "backend" else ""
    peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    limit = f"{100 * row.of_limit:.0f} % {row.bound}"
    return (*start, f"{1e3 * row.timing.median_s:.3f}", f"{1e3 * row.timing.spread_s:.3f}", peak, limit, ratios)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side.

    Example
    -------
    >>> print(table([("op", "ms"), ("ssd", "1.5")]))
    op  | ms
    ssd | 1.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
