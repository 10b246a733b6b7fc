"""What the blocked convolution does to one block, forwards and backwards; :mod:`.torch_blocked` has the formula."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Entries of one scratch tensor for each thread, 512 KiB in float32: half of a core's second-level cache, where the
# multiply-adds run.
BLOCK_ELEMENTS = 2**17


class Plan(NamedTuple):
    """How a call is cut up."""

    ends: list[int]  # valid frames of each sequence
    reverse: bool
    silu: bool
    dtype: torch.dtype  # of the arithmetic
    block: int  # frames of a block

    @classmethod
    def of(cls, x: Tensor, lengths: Tensor | None, reverse: bool, silu: bool) -> "Plan":
        batch, num_frames, channels = x.shape
        ends = [num_frames] * batch if lengths is None else lengths.tolist()
        # Only a CPU gains from blocks: elsewhere each sequence is one.
        block = max(1, num_frames)
        if x.device.type == "cpu":
            block = max(16, BLOCK_ELEMENTS * torch.get_num_threads() // max(1, channels))
        return cls(ends, reverse, silu, torch.promote_types(x.dtype, torch.float32), block)

    def taps(self, weight: Tensor) -> Tensor:
        """(D, K) to (K, D), in the order of time."""
        taps = weight.to(self.dtype).t()
        return (taps.flip(0) if self.reverse else taps).contiguous()

    def in_time(self, state: Tensor) -> Tensor:
        """(B, D, K-1) in the order of the scan to (B, K-1, D) in the order of time."""
        return state.transpose(1, 2).flip(1) if self.reverse else state.transpose(1, 2)

    def in_scan(self, history: Tensor) -> Tensor:
        """The way back."""
        return (history.flip(1) if self.reverse else history).transpose(1, 2)

    def histories(self, state: Tensor | None, x: Tensor, past: int) -> Tensor:
        return x.new_zeros(x.size(0), past, x.size(2)) if state is None else self.in_time(state)

    def blocks(self, end: int) -> Iterator[slice]:
        return (slice(start, min(start + self.block, end)) for start in range(0, end, self.block))


class Extended(NamedTuple):
    """``e``: the valid frames of one sequence (n, D) and its history (K-1, D), which are not copied together."""

    frames: Tensor
    history: Tensor
    reverse: bool

    def parts(self, start: int, stop: int) -> list[Tensor]:
        """Views of e[start:stop] in the order of time, one of which can be empty."""
        border = self.frames.size(0) if self.reverse else self.history.size(0)
        first, second = (self.frames, self.history) if self.reverse else (self.history, self.frames)
        return [first[start : min(stop, border)], second[max(start - border, 0) : max(stop - border, 0)]]

    def read(self, start: int, stop: int, out: Tensor) -> Tensor:
        first, second = self.parts(start, stop)
        out = out[: stop - start]
        out[: first.size(0)] = first
        out[first.size(0) :] = second
        return out

    def write(self, start: int, values: Tensor) -> None:
        first, second = self.parts(start, start + values.size(0))
        first.copy_(values[: first.size(0)])
        second.copy_(values[first.size(0) :])

    def add(self, start: int, values: Tensor) -> None:
        first, second = self.parts(start, start + values.size(0))
        first += values[: first.size(0)]
        second += values[first.size(0) :]

    def last_seen(self) -> int:
        """Where the K-1 frames begin that the scan saw last."""
        return 0 if self.reverse else self.frames.size(0)


def convolve(seen: Tensor, taps: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """bias + K shifted multiply-adds over ``seen`` (frames + K-1, D), into the first frames of ``out``."""
    width = taps.size(0)
    num_frames = seen.size(0) - width + 1
    out = torch.addcmul(bias, seen[:num_frames], taps[0], out=out[:num_frames])
    for k in range(1, width):
        out.addcmul_(seen[k : k + num_frames], taps[k])
    return out
