"""The one stopwatch: medians with their spread, on a CPU and on a GPU, of one call or of several in turns."""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median, quantiles

import torch


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


def peak_rss_gib() -> float:
    """The most memory (GiB, resident) that this process or any of its finished children has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        * unit
        / 2**30
    )
