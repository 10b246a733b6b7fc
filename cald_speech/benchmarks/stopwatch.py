"""What is measured, and with what: time, peak memory, and what the device can do at best.

*Time*: medians with their spread, on a CPU and on a GPU, of one call or of several in turns.

*Peak memory* of one call is what it needs beyond its inputs. On a GPU that is the allocator's own count. On a CPU it is
resident memory, measured in a process forked for this one call: every block of 64 KiB or more is mapped and unmapped by
itself there, so that nothing freed is counted and nothing reused is overlooked (scratch kept by an earlier call, say);
Linux resets its high-water mark on request. The process gets most of the free memory and no more, so that a case that
is too large is a line in the table, not a dead machine.

*The limit*: an op cannot be faster than max(bytes / copy bandwidth, operations / matmul rate), both measured in the run
that is compared with it, where the bytes are each input read once and each output written once. Operations are counted
in the form with the fewest; both are lower bounds, so 100 % is out of reach for a chunked scan, which does more
arithmetic than the recurrence to have it in matrix products.
"""

import ctypes
import math
import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED_FROM_BYTES = 2**16
# Of the free memory, what a case may take.
SHARE = 0.8
# Larger than any cache, and matrices large enough for the full rate.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
MATRIX_SIZE = {"cpu": 1536, "cuda": 8192}
Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one call, in the order in which they ran.

    Example
    -------
    >>> timing = Timing((3.0, 1.0, 2.0, 9.0, 2.0))
    >>> timing.median_s, timing.fastest_s, timing.slowest_s, timing.spread_s
    (2.0, 1.0, 9.0, 1.0)
    """

    seconds: tuple[float, ...]

    @cached_property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def fastest_s(self) -> float:
        return min(self.seconds)

    @property
    def slowest_s(self) -> float:
        return max(self.seconds)

    @property
    def spread_s(self) -> float:
        """Interquartile range: the middle half of the repetitions lies within so many seconds."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def ratio_to(self, other: "Timing") -> float:
        """Median of the ratios of neighbouring repetitions, for timings of one :func:`measure_in_turns`.

        Example
        -------
        >>> Timing((1.0, 2.0, 30.0)).ratio_to(Timing((2.0, 4.0, 60.0)))  # the machine slowed down, for both
        0.5
        """
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def measure(call: Callable[[], object], *, repeats: int = 3, warmup: int = 1, device: str = "cpu") -> Timing:
    """Time ``call`` ``repeats`` times after ``warmup`` calls; on a GPU each call is waited for.

    Example
    -------
    >>> timing = measure(lambda: sum(range(1000)), repeats=3)
    >>> timing.fastest_s <= timing.median_s <= timing.slowest_s
    True
    """
    return measure_in_turns({"": call}, repeats=repeats, warmup=warmup, device=device)[""]


def measure_in_turns(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = 5, warmup: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Time several calls, each once in every round: a machine that slows down slows all of them.

    Every second round runs in opposite order, so that no call always finds the caches of the same neighbour.

    Example
    -------
    >>> timings = measure_in_turns({"sum": lambda: sum(range(10)), "max": lambda: max(range(10))}, repeats=3)
    >>> {name: len(timing.seconds) for name, timing in timings.items()}
    {'sum': 3, 'max': 3}
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds = {name: [] for name in calls}
    for turn in range(repeats):
        for name in reversed(calls) if turn % 2 else calls:
            seconds[name].append(seconds_of(calls[name], device=device))
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def crossover(a: Line, b: Line) -> tuple[float, float] | None:
    """Where two lines through (duration, value) points cross on logarithmic axes; None where they do not.

    Example
    -------
    >>> x, y = crossover([(1, 1.0), (100, 100.0)], [(1, 10.0), (100, 10.0)])
    >>> round(x), round(y)
    (10, 10)
    """
    first, second = dict(a), dict(b)
    shared = sorted(first.keys() & second.keys())
    for left, right in pairwise(shared):
        apart = [math.log(first[x] / second[x]) for x in (left, right)]
        if apart[0] * apart[1] < 0:
            along = apart[0] / (apart[0] - apart[1])
            mix = lambda p, q: math.exp((1 - along) * math.log(p) + along * math.log(q))  # noqa: B023, E731
            return mix(left, right), mix(first[left], first[right])
    return None


def seconds_of(call: Callable[[], object], *, device: str = "cpu") -> float:
    """Seconds of one call, from an idle device until the device is idle again."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    seconds = time.perf_counter() - start
    del result  # what it takes to free the result is not the call's
    return seconds


class OutOfMemory(Exception):
    """A case needs more memory than there is."""


class OutOfTime(Exception):
    """A case takes longer than was allowed."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch failed to allocate: its CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def cuda_peak(call: Callable[[], object], device: str) -> int:
    """Bytes that the call allocates at most beyond what is allocated already."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peak(
    prepare: Callable[..., tuple[Callable, Callable]], *arguments: object, longest_s: float | None = None
) -> int | None:
    """Bytes that a call holds at most beyond its inputs, or None where the system cannot tell (it is not Linux).

    Arguments
    ---------
    prepare : a function at the top of its module. In the forked process ``prepare(*arguments)`` returns two calls: one
        at a small size, which loads the code and starts the threads, and the one that is measured.
    longest_s : seconds after which the process is ended, its start included; None waits.

    Raises
    ------
    OutOfMemory
        where it needs more than the free memory, with how much that was.
    OutOfTime
        where it was ended.
    """
    if not CLEAR.exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__])
    ours, theirs = context.Pipe(duplex=False)
    limit = int(SHARE * free_bytes())
    process = context.Process(target=_measure, args=(theirs, limit, torch.get_num_threads(), prepare, arguments))
    process.start()
    theirs.close()
    if not ours.poll(longest_s):
        process.kill()
        process.join()
        raise OutOfTime(f"one call takes more than {longest_s:g} s")
    try:
        answer = ours.recv()
    except EOFError:  # it died: an allocation outside torch (in the BLAS, say) failed
        answer = None
    process.join()
    if answer is None and process.exitcode == 1:
        raise RuntimeError("the call failed in the process that measures its memory; the traceback stands above")
    if answer is None:
        raise OutOfMemory(f"died with status {process.exitcode}, allowed {limit / 2**30:.1f} GiB")
    if isinstance(answer, str):
        raise OutOfMemory(f"needs more than {limit / 2**30:.1f} GiB: {answer}")
    return answer


def free_bytes() -> int:
    """What Linux could give without swapping."""
    return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024


def resident(*fields: str, process: int | str = "self") -> int:
    """Bytes, the sum of such fields as VmHWM or RssAnon of this process, or of another by its number.

    Example
    -------
    >>> not STATUS.exists() or resident("VmHWM") >= resident("RssAnon") > 0
    True
    """
    text = Path(f"/proc/{process}/status").read_text()
    return sum(int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024 for field in fields)


def _measure(answer: Connection, limit: int, threads: int, prepare: Callable, arguments: Sequence[object]) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + limit,) * 2)
    try:
        small, call = prepare(*arguments)
        before = resident("RssAnon")  # before the small call, which may keep scratch
        small()
        CLEAR.write_text("5")
        result = call()
        # Pages of code and of files are not the call's; a call of next to nothing may hold less than start-up left.
        answer.send(max(0, resident("VmHWM") - resident("RssFile", "RssShmem") - before))
        del result
    except MemoryError as error:
        answer.send(str(error) or "MemoryError")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        answer.send(str(error).splitlines()[0])


def peak_rss_gib() -> float:
    """The most memory (GiB, resident) that this process or any of its finished children has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        * unit
        / 2**30
    )


@dataclass(frozen=True)
class Limits:
    """Bytes per second of a copy, read and written, and operations per second of a square matrix product by dtype."""

    copy_bytes_per_s: float
    matmul_per_s: Mapping[torch.dtype, float]

    def seconds(self, num_bytes: int, operations: int, dtype: torch.dtype) -> tuple[float, str]:
        """The least time for so much traffic and arithmetic, and which of the two it takes: ``copy`` or ``matmul``.

        Example
        -------
        >>> Limits(100.0, {torch.float32: 10.0}).seconds(200, 50, torch.float32)
        (5.0, 'matmul')
        """
        return max((num_bytes / self.copy_bytes_per_s, "copy"), (operations / self.matmul_per_s[dtype], "matmul"))


def measure_limits(device: str, dtypes: Iterable[torch.dtype]) -> Limits:
    """Measure both now, on this device; float32 products in full precision."""
    kind = torch.device(device).type
    source = torch.ones(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), repeats=7, warmup=2, device=device)
    size = MATRIX_SIZE[kind]
    rates = {}
    for dtype in dict.fromkeys(dtypes):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = measure(lambda a=a, b=b: a @ b, repeats=5, warmup=2, device=device)
        rates[dtype] = 2 * size**3 / product.median_s
    return Limits(2 * source.numel() / copy.median_s, rates)


def least_traffic(inputs: Iterable[Tensor], output: Tensor, *, backward: bool) -> int:
    """Bytes of each input read once and each output written once.

    With the backward pass, which starts when all of the output is there: the inputs are read once more, with the
    output's gradient, and the gradients of all inputs are written.

    Example
    -------
    >>> x = torch.ones(100)
    >>> least_traffic([x], x, backward=False), least_traffic([x], x, backward=True)
    (800, 2000)
    """
    read, written = sum(v.nbytes for v in inputs), output.nbytes
    return read + written + (2 * read + written if backward else 0)
