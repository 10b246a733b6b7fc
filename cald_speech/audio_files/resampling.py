"""Resampling any part of a signal as if all of it were resampled: a windowed sinc with taps of its own for each phase.

From rate p to rate q (in lowest terms) and with b = 0.99 min(p, q), sample j of the output is

    y_j = sum_i x_i h(b (i / p - j / q)),   h(t) = (b / p) sinc(t) cos^2(pi t / 12) for |t| < 6, else 0

which is torchaudio.functional.resample with its defaults (J. O. Smith, "Digital Audio Resampling", 2002). h(t) ends six
zero crossings from its middle, so any y_j reads a few dozen samples; j and j + q have the same taps, so the output is
made in groups of q samples, one of each phase.
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ZERO_CROSSINGS = 6
ROLLOFF = 0.99
# Output samples made at once: their windows of the input stay near the caches.
OUTPUTS_AT_ONCE = 2**14
# Phases whose taps share a window: few enough that most of it is taps, enough for a matrix product.
PHASES = 32


class Resampler:
    """From ``rate`` to ``new_rate`` Hz; equal rates hand the samples through.

    Example
    -------
    >>> resampler = Resampler(8_000, 16_000)
    >>> resampler.num_outputs(100)
    200
    >>> first, stop = resampler.inputs(50, 60)  # what output samples 50 to 59 are made of
    >>> x = torch.randn(100)
    >>> whole = resampler(x, 0, 0, 200)
    >>> torch.allclose(resampler(x[first:stop], first, 50, 60), whole[50:60], atol=1e-6)
    True
    """

    def __init__(self, rate: int, new_rate: int):
        common = math.gcd(rate, new_rate)
        self.old, self.new = rate // common, new_rate // common
        self.width = math.ceil(ZERO_CROSSINGS * self.old / (min(self.old, self.new) * ROLLOFF))

    @property
    def reach(self) -> int:
        """Input samples that an output reads beyond its own place."""
        return 0 if self.old == self.new else self.width + 1

    def num_outputs(self, num_inputs: int) -> int:
        """Samples that so many input samples give."""
        return -(-num_inputs * self.new // self.old)

    def inputs(self, start: int, stop: int) -> tuple[int, int]:
        """First and last (exclusive) input sample that outputs [start, stop) read; both may lie outside the signal."""
        if self.old == self.new:
            return start, stop
        return start * self.old // self.new - self.width, (stop - 1) * self.old // self.new + self.width + 2

    def __call__(self, x: Tensor, first: int, start: int, stop: int) -> Tensor:
        """Outputs [start, stop) as (stop - start,) float32.

        ``x`` (N,) float32 holds the input from sample ``first`` on: at least what :meth:`inputs` names as far as the
        signal reaches. Beyond its ends the signal counts as zero.
        """
        if self.old == self.new:
            return x[start - first : stop - first]
        groups = range(start // self.new, -(-stop // self.new))
        lowest = groups.start * self.old - self.width
        highest = groups.stop * self.old + self.width + 1
        # What is missing is zero: beyond the signal's ends, and where it serves only samples that are cut off below.
        x = torch.nn.functional.pad(x, (first - lowest, highest - first - x.numel()))
        size = max(1, OUTPUTS_AT_ONCE // self.new)
        parts = [self._groups(x[g * self.old :], min(size, len(groups) - g)) for g in range(0, len(groups), size)]
        return torch.cat(parts).flatten()[start - groups.start * self.new :][: stop - start]

    def _groups(self, x: Tensor, count: int) -> Tensor:
        """(count, q): the first ``count`` groups of outputs, as products of windows p samples apart with the taps."""
        runs = kernel(self.old, self.new, self.width)
        return torch.cat([x[run.first :].unfold(0, len(run.taps), self.old)[:count] @ run.taps for run in runs], dim=1)


def resampled(parts: Iterable[Tensor], rate: int, new_rate: int) -> Iterator[Tensor]:
    """Audio that arrives part by part, at another rate: each sample as soon as all that it is made of has come.

    Example
    -------
    >>> x = torch.randn(1_000)
    >>> whole = Resampler(8_000, 16_000)(x, 0, 0, 2_000)
    >>> torch.allclose(torch.cat(list(resampled(x.split(300), 8_000, 16_000))), whole, atol=1e-6)
    True
    """
    resampler = Resampler(rate, new_rate)
    kept, first, start, count = torch.empty(0), 0, 0, 0
    for part in parts:
        kept, count = torch.cat([kept, part]), count + part.numel()
        stop = resampler.num_outputs(max(0, count - resampler.reach))
        if stop > start:
            yield resampler(kept, first, start, stop)
            start, reads = stop, max(0, resampler.inputs(stop, stop + 1)[0])
            kept, first = kept[reads - first :], reads
    stop = resampler.num_outputs(count)
    if stop > start:
        yield resampler(kept, first, start, stop)


class Run(NamedTuple):
    """Taps of neighbouring phases, whose windows are nearly the same."""

    first: int  # where the window begins, counted from the first sample that the group reads
    taps: Tensor  # (samples of the window, phases)


# A rate without a common divisor has thousands of phases, up to 70 MB of taps.
@lru_cache(maxsize=4)
def kernel(old: int, new: int, width: int) -> list[Run]:
    """The taps of all phases, worked out in float64; a run's window is some two widths longer than its phases reach."""
    runs = []
    for start in range(0, new, PHASES):
        # torchaudio keeps the phases in float32, which moves its taps by up to 1e-4: the samples are to be the same.
        phase = (torch.arange(-start, -min(start + PHASES, new), -1) / new).double()
        first, last = start * old // new, (start + len(phase) - 1) * old // new + 2 * width + 1
        reads = (torch.arange(first, last + 1) - width)[:, None] / float(old)
        t = ((reads + phase) * (min(old, new) * ROLLOFF)).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
        window = torch.cos(t * (math.pi / ZERO_CROSSINGS / 2)) ** 2
        runs.append(Run(first, (torch.sinc(t) * window * (min(old, new) * ROLLOFF / old)).float()))
    return runs
