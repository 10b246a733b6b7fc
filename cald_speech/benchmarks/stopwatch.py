"""The one stopwatch: medians with their spread, on a CPU and on a GPU."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over the repeats, the fastest and the slowest."""

    median_s: float
    fastest_s: float
    slowest_s: float


def measure(call: Callable[[], object], *, repeats: int = 3, warmup: int = 1, device: str = "cpu") -> Timing:
    """Time ``call`` ``repeats`` times after ``warmup`` calls; on a GPU each call is waited for.

    Example
    -------
    >>> timing = measure(lambda: sum(range(1000)), repeats=3)
    >>> timing.fastest_s <= timing.median_s <= timing.slowest_s
    True
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return Timing(median(times), min(times), max(times))


def peak_rss_gib() -> float:
    """The most memory (GiB, resident) that this process or any of its finished children has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        * unit
        / 2**30
    )
