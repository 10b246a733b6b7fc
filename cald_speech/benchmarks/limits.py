"""What a device can do at best, measured in the run that is compared with it: copies and matrix products.

An op cannot be faster than max(bytes / copy bandwidth, operations / matmul rate), where the bytes are each input read
once and each output written once. Operations are counted in the form with the fewest; both are lower bounds, so 100 %
is out of reach for a chunked scan, which does more arithmetic than the recurrence to have it in matrix products.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cald_speech.benchmarks.stopwatch import measure

# Larger than any cache, and matrices large enough for the full rate.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
MATRIX_SIZE = {"cpu": 1536, "cuda": 8192}


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
