"""How many frames a mixer remembers: from the decay rates A and the step sizes dt that the data call forth.

Over a run of frames a head's state decays to exp(sum dt A). With the mean of dt |A| over the valid frames, it has
fallen below 1 % after ln(100) / mean(dt |A|) frames: that is called the effective memory here. Heads whose steps vary
much forget faster on some frames than on others, which one mean does not show.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import singledispatch
from typing import Any

from torch import Tensor, nn

from cald_speech.evaluation.forward import Mean
from cald_speech.mixers import Bidirectional, CausalMixer, Mixer
from cald_speech.mixers.ssd_scan import SSDScan
from cald_speech.ops import mask_padding

LEFT = 0.01  # of the state, when it counts as forgotten
LEAST = 1e-12  # a head that never forgets gets a long memory, not an infinite one: JSON has no infinity


@singledispatch
def decay(scan: nn.Module, scanned: tuple[Tensor, ...]) -> Tensor | None:
    """dt |A| of each frame and head, (B, T, H), from the streams of the mixer's projection; None for no such decay.

    A scan of another kind joins in with ``decay.register``.
    """
    return None


@decay.register
def _(scan: SSDScan, scanned: tuple[Tensor, ...]) -> Tensor:
    _, dt = scanned
    return scan.step_sizes(dt) * -scan.decay_rates()


@singledispatch
def directions(mixer: Mixer) -> dict[str, tuple[CausalMixer, nn.Module]]:
    """Each direction's scan, and the mixer whose projection it reads; none for a mixer without scans."""
    return {}


@directions.register
def _(mixer: CausalMixer) -> dict[str, tuple[CausalMixer, nn.Module]]:
    return {"forwards": (mixer, mixer.scan)}


@directions.register
def _(mixer: Bidirectional) -> dict[str, tuple[CausalMixer, nn.Module]]:
    past = mixer.forwards
    if mixer.share_projections:
        return {"forwards": (past, past.scan), "backwards": (past, mixer.backward_scan)}
    return {"forwards": (past, past.scan), "backwards": (mixer.backwards, mixer.backwards.scan)}


class MemoryMeter:
    """Watches a mixer and averages its decay over the valid frames it is run on.

    Example
    -------
    >>> import torch
    >>> mixer = Bidirectional(64, num_heads=4)
    >>> with metered({0: mixer}) as meters, torch.no_grad():
    ...     y = mixer(torch.randn(2, 10, 64), torch.tensor([10, 7]))
    >>> {direction: len(heads) for direction, heads in meters[0].frames().items()}
    {'forwards': 4, 'backwards': 4}
    """

    def __init__(self) -> None:
        self.means: dict[str, Mean] = {}

    def __call__(self, mixer: Mixer, args: tuple[Tensor, ...], output: Any) -> None:
        """The forward hook: ``args`` are x (B, T, D) and, where something is padded, lengths (B,)."""
        x, lengths = (*args, None)[:2]
        for direction, (projecting, scan) in directions(mixer).items():
            per_frame = decay(scan, projecting.project(x).scanned)
            if per_frame is not None:
                count = x.size(0) * x.size(1) if lengths is None else lengths.sum()
                self.means.setdefault(direction, Mean()).add(mask_padding(per_frame, lengths).sum((0, 1)), count)

    def frames(self) -> dict[str, list[float]]:
        """The effective memory of each head in frames, by direction; empty for a mixer without a decay."""
        return {
            direction: [-math.log(LEFT) / max(value, LEAST) for value in mean.values()]
            for direction, mean in self.means.items()
        }


@contextmanager
def metered(mixers: Mapping[int, Mixer]) -> Iterator[dict[int, MemoryMeter]]:
    """A meter on each mixer, by the same keys, while the ``with`` block runs."""
    meters = {key: MemoryMeter() for key in mixers}
    handles = [mixer.register_forward_hook(meters[key]) for key, mixer in mixers.items()]
    try:
        yield meters
    finally:
        for handle in handles:
            handle.remove()
