"""From audio to the first layer's input, a piece at a time, each piece with the halo that its convolutions see."""

from collections.abc import Callable

import torch
from torch import Tensor

from cald_speech.errors import UserError
from cald_speech.families import FrontEnd, Moments
from cald_speech.longform.layers import Frames
from cald_speech.longform.source import SAMPLE_RATE, AudioSource
from cald_speech.longform.statistics import AudioStatistics

SAMPLES_PER_READ = 2**18


def measure(source: AudioSource, front: FrontEnd, *, normalise: bool) -> AudioStatistics:
    """The first pass: how much audio there is, and what must be known of all of it."""
    statistics = AudioStatistics.for_model(front, normalise=normalise)
    for samples in source.blocks(SAMPLES_PER_READ):
        statistics.add(samples)
    return statistics


def convolve(front: FrontEnd, samples: Tensor, moments: Moments | None) -> Tensor:
    """Normalised samples (n,), in dtype and on the device of the model, to all their frames, projected: (1, t, D)."""
    given = {} if moments is None else {"moments": moments}
    return front.projection(front.convolutions(samples[None], **given).transpose(1, 2))


def fill(
    frames: Frames,
    front: FrontEnd,
    source: AudioSource,
    statistics: AudioStatistics,
    block: int,
    done: Callable[[int], None],
) -> None:
    """Write every frame after convolutions and projection, ``block`` of them at a time."""
    moments = statistics.moments(front)
    for start in range(0, frames.num_frames, block):
        stop = min(start + block, frames.num_frames)
        first, last = start * front.stride, (stop - 1) * front.stride + front.receptive_field
        samples = source.read(first, last)
        if samples.numel() < last - first:
            raise UserError(
                f"the audio has become shorter since it was first read: at {first / SAMPLE_RATE:.1f} s it ends. Let "
                "nothing write to the file, and start again"
            )
        frames.x[start:stop] = convolve(front, statistics.normalised(samples).to(frames.frame()), moments)[0]
        done(stop - start)


def add_positions(frames: Frames, front: FrontEnd, block: int) -> None:
    """Add the positional convolution's output in place, and apply the norm behind it.

    A piece's own zero padding counts at the ends of the audio alone; elsewhere it falls into the halo that is cut off.
    The frames before a piece are overwritten by then, so the few that it sees are kept.
    """
    reach = front.positions_reach
    before = frames.x[:0]
    for start in range(0, frames.num_frames, block):
        stop = min(start + block, frames.num_frames)
        seen = torch.cat([before, frames.x[start : stop + reach]])[None].to(frames.device)
        own = slice(before.size(0), before.size(0) + stop - start)
        positions = front.positions(seen)[:, own]
        before = torch.cat([before, frames.x[start:stop]])[-reach:]
        frames.x[start:stop] = front.input_norm(seen[:, own] + positions)[0]
