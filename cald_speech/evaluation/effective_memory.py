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
from cald_speech.mixers import Bidirectional, CausalMixer, Hydra, Mixer
from cald_speech.mixers.mamba import MambaScan
from cald_speech.mixers.mamba2 import SSDScan
from cald_speech.mixers.normalised_linear_attention import FeatureScan, Frames
from cald_speech.ops import mask_padding

LEFT = 0.01  # of the state, when it counts as forgotten
LEAST = 1e-12  # a head that never forgets gets a long memory, not an infinite one: JSON has no infinity


@singledispatch
def scan_decay(scan: nn.Module, scanned: tuple[Tensor, ...], lengths: Tensor | None, reverse: bool) -> Tensor | None:
    """dt |A| of each frame and head, (B, T, H), from the streams of the mixer's projection; None for no such decay.

    A scan of another kind joins in with ``scan_decay.register``.
    """
    return None


@scan_decay.register
def _(scan: SSDScan, scanned: tuple[Tensor, ...], lengths: Tensor | None, reverse: bool) -> Tensor:
    _, dt = scanned
    return scan.step_sizes(dt) * -scan.decay_rates()


@scan_decay.register
def _(scan: FeatureScan, scanned: tuple[Tensor, ...], lengths: Tensor | None, reverse: bool) -> Tensor:
    return Frames(*scanned[1:5]).steps * -scan.decay_rates()


@scan_decay.register
def _(scan: MambaScan, scanned: tuple[Tensor], lengths: Tensor | None, reverse: bool) -> Tensor:
    # Every channel is a head; of its state's entries, the one that remembers longest.
    x, _ = scan.conv1d(scanned[0], lengths, state=None, reverse=reverse)
    return scan.step_sizes(x) * scan.A_log.float().exp().min(-1).values


@singledispatch
def decays(mixer: Mixer, x: Tensor, lengths: Tensor | None) -> dict[str, Tensor | None]:
    """dt |A| by direction for an input (B, T, D); none for a mixer without scans. Others join with ``register``."""
    return {}


@decays.register
def _(mixer: CausalMixer, x: Tensor, lengths: Tensor | None) -> dict[str, Tensor | None]:
    return {"forwards": scan_decay(mixer.scan, mixer.project(x).scanned, lengths, False)}


@decays.register
def _(mixer: Bidirectional, x: Tensor, lengths: Tensor | None) -> dict[str, Tensor | None]:
    past = mixer.forwards
    future, scan = (past, mixer.backward_scan) if mixer.share_projections else (mixer.backwards, mixer.backwards.scan)
    return {
        "forwards": scan_decay(past.scan, past.project(x).scanned, lengths, False),
        "backwards": scan_decay(scan, future.project(x).scanned, lengths, True),
    }


@decays.register
def _(mixer: Hydra, x: Tensor, lengths: Tensor | None) -> dict[str, Tensor | None]:
    (xBC, per_head), _ = mixer.project(x)
    past, future, _ = per_head.chunk(3, dim=-1)
    return {
        "forwards": scan_decay(mixer.scan, (xBC, past), lengths, False),
        "backwards": scan_decay(mixer.backward_scan, (xBC, future), lengths, True),
    }


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
        for direction, per_frame in decays(mixer, x, lengths).items():
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
