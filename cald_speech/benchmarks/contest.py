"""One case, all who can run it: parity first, then memory, then time in turns."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

from torch import Tensor

from cald_speech.benchmarks.limits import Limits
from cald_speech.benchmarks.memory import OutOfMemory, OutOfTime, cpu_peak, cuda_peak, is_out_of_memory
from cald_speech.benchmarks.ops_workloads import OPS, Case, least_work, make_inputs, step
from cald_speech.benchmarks.parity import parity_fault, peer_fault
from cald_speech.benchmarks.peers import PEERS
from cald_speech.benchmarks.rows import Row
from cald_speech.benchmarks.stopwatch import measure_in_turns, seconds_of

# The recurrence steps through the frames one by one: beyond so many it is timed only if it is asked for.
NAIVE_FRAMES = 500
WARM_UP_FRAMES = 100
CLEARLY_SLOWER = 1.6


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
    """For :func:`cald_speech.benchmarks.memory.cpu_peak`: a contestant's step at a small size, and at the case's."""
    small = replace(case, batch=1, num_frames=min(case.num_frames, WARM_UP_FRAMES))
    one = contestants(case, backends=tuple(OPS[case.op].backends))[name]
    return tuple(step(one.call, one.prepare(make_inputs(c)), backward=case.backward) for c in (small, case))


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
