"""From audio to the first layer's input: one pass for what must be known of all of it, then a piece at a time.

The input is normalised to mean 0 and variance 1; in GroupNorm models (wav2vec2-base and its kin) each channel of the
first convolution's output y = w * x + b is normalised over time. Both follow from sums over x: with windows
u_t = x[s t : s t + K] under the kernel of size K and stride s,

    mean(y) = w . mean(u) + b        var(y) = w^T cov(u) w

so that K + K^2 sums in float64 stand for a run of the convolution over hours. In the second pass each piece has the
halo that its convolutions see.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cald_speech.errors import UserError
from cald_speech.families import FrontEnd, Moments
from cald_speech.families.front_end import Piece
from cald_speech.families.log_mel import LogMel
from cald_speech.longform.layers import Frames
from cald_speech.longform.source import SAMPLE_RATE, AudioSource

SAMPLES_PER_READ = 2**18
# transformers' feature extractor adds it to the variance of the input.
INPUT_EPS = 1e-7


def measure(
    source: AudioSource,
    front: FrontEnd,
    *,
    normalise: bool,
    progress: Callable[[float], None] | None = None,
) -> "AudioStatistics":
    """The first pass: how much audio there is, and what must be known of all of it.

    ``progress`` is called with 0 after every block: nothing counts as done yet, but what it raises ends the work.
    """
    statistics = AudioStatistics.for_model(front, normalise=normalise)
    for samples in source.blocks(SAMPLES_PER_READ):
        statistics.add(samples)
        if progress is not None:
            progress(0.0)
    statistics.finish()
    return statistics


class AudioStatistics:
    """Sums over all samples; ``add`` takes them in order, in parts of any size.

    ``normalise`` says whether the model's input is brought to mean 0 and variance 1.

    Example
    -------
    >>> statistics = AudioStatistics(kernel=10, stride=5, normalise=True)
    >>> for part in torch.arange(1000.0).split(300):
    ...     statistics.add(part)
    >>> statistics.num_samples
    1000
    >>> statistics.normalised(torch.tensor([499.5]))
    tensor([0.])
    """

    def __init__(self, kernel: int, stride: int, *, normalise: bool):
        self.kernel, self.stride, self.normalise = kernel, stride, normalise
        self.num_samples = self.num_windows = 0
        # Sums are taken around a value near the mean (the first one seen): a big offset would drown small sounds.
        self.origin = 0.0
        self.sums = torch.zeros(2, dtype=torch.float64)  # of the samples and their squares
        self.window_sums = torch.zeros(kernel, dtype=torch.float64)
        self.window_products = torch.zeros(kernel, kernel, dtype=torch.float64)
        self.rest = torch.zeros(0, dtype=torch.float64)  # what the next windows begin with

    @classmethod
    def for_model(cls, front: FrontEnd, *, normalise: bool) -> "AudioStatistics":
        if front.log_mel is not None:
            return FeatureStatistics(front.log_mel)
        return cls(front.kernels[0], front.strides[0], normalise=normalise)

    def add(self, samples: Tensor) -> None:
        """The next (n,) samples."""
        if not samples.numel():
            return
        if self.num_samples == 0:
            self.origin = samples.double().mean().item()
        x = samples.double() - self.origin
        self.num_samples += x.numel()
        self.sums += torch.stack([x.sum(), x.square().sum()])
        self.rest = torch.cat([self.rest, x])
        if self.rest.numel() >= self.kernel:
            windows = self.rest.unfold(0, self.kernel, self.stride)
            self.num_windows += windows.size(0)
            self.window_sums += windows.sum(0)
            self.window_products += windows.t() @ windows
            self.rest = self.rest[windows.size(0) * self.stride :].clone()

    def finish(self) -> None:
        """To be called behind the last sample."""

    @property
    def mean_and_scale(self) -> tuple[float, float]:
        """What the samples are brought to size with: (x - mean) * scale."""
        if not self.normalise:
            return 0.0, 1.0
        mean, square = (self.sums / max(1, self.num_samples)).tolist()
        return self.origin + mean, (max(0.0, square - mean**2) + INPUT_EPS) ** -0.5

    def normalised(self, samples: Tensor) -> Tensor:
        """Samples as the model takes them."""
        mean, scale = self.mean_and_scale
        return (samples - mean) * scale if self.normalise else samples

    def moments(self, front: FrontEnd) -> Moments | None:
        """Mean and variance over time of what the first convolution makes of the normalised audio, float64.

        None for models that do not normalise it.
        """
        if front.normed is None:
            return None
        weight, bias = front.normed.weight.detach()[:, 0].double(), front.normed.bias
        mean, scale = self.mean_and_scale
        average = self.window_sums / max(1, self.num_windows)
        covariance = self.window_products / max(1, self.num_windows) - average.outer(average)
        average, covariance = (average + self.origin - mean).to(weight.device) * scale, covariance.to(weight.device)
        channels = weight @ average + (0 if bias is None else bias.detach().double())
        return Moments(channels, ((weight @ covariance) * weight).sum(1).clamp(min=0) * scale**2)


class FeatureStatistics(AudioStatistics):
    """The same for a model that hears features: sums over their frames; samples stay as they are."""

    def __init__(self, log_mel: LogMel):
        self.log_mel, self.num_samples, self.num_frames = log_mel, 0, 0
        self.rest = torch.zeros(log_mel.lead)
        self.origin = torch.zeros(log_mel.channels, dtype=torch.float64)
        self.sums = torch.zeros(2, log_mel.channels, dtype=torch.float64)

    def add(self, samples: Tensor) -> None:
        self.num_samples += samples.numel()
        self.rest = torch.cat([self.rest, samples.float().cpu()])
        self._add(self.log_mel(self.rest))

    def finish(self) -> None:
        self._add(self.log_mel(self.rest, ended=True))

    def _add(self, features: Tensor) -> None:
        if not len(features):
            return
        features = features.double()
        if not self.num_frames:
            self.origin = features.mean(0)
        self.num_frames += len(features)
        features = features - self.origin
        self.sums += torch.stack([features.sum(0), features.square().sum(0)])
        self.rest = self.rest[len(features) * self.log_mel.hop :].clone()

    def normalised(self, samples: Tensor) -> Tensor:
        return samples

    def moments(self, front: FrontEnd) -> Moments:
        mean, square = self.sums / max(1, self.num_frames)
        variance = (square - mean**2).clamp(min=0) * self.num_frames / max(1, self.num_frames - 1)
        return Moments(mean + self.origin, variance)


def convolve(front: FrontEnd, samples: Tensor, moments: Moments | None, piece: Piece | None = None) -> Tensor:
    """Normalised samples (n,), in dtype and on the device of the model, to all their frames, projected: (1, t, D)."""
    given = {} if moments is None else {"moments": moments}
    given |= {"piece": piece} if front.lead else {}
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
        first, last = front.samples_of(start, stop)
        first, last = max(0, first), min(last, statistics.num_samples)
        samples = source.read(first, last)
        if samples.numel() < last - first:
            raise UserError(
                f"the audio has become shorter since it was first read: at {first / SAMPLE_RATE:.1f} s it ends. Let "
                "nothing write to the file, and start again"
            )
        samples = statistics.normalised(samples)
        samples = samples if front.log_mel is not None else samples.to(frames.frame())
        frames.x[start:stop] = convolve(front, samples, moments, Piece(start, stop, statistics.num_samples))[0]
        done(stop - start)


def add_positions(frames: Frames, front: FrontEnd, block: int, done: Callable[[int], None]) -> None:
    """Add the positional convolution's output in place, and apply the norm behind it; ``frames`` are then the layers'.

    A piece's own zero padding counts at the ends of the audio alone; elsewhere it falls into the halo that is cut off.
    The frames before a piece are overwritten by then, so the few that it sees are kept.
    """
    reach, squeeze = front.positions_reach, front.squeeze
    block = max(1, block // squeeze) * squeeze
    before = frames.x[:0]
    for start in range(0, frames.num_frames, block):
        stop = min(start + block, frames.num_frames)
        seen = torch.cat([before, frames.x[start : stop + reach]])[None].to(frames.device)
        first = before.size(0) // squeeze
        own = slice(first, first + (stop - start) // squeeze)
        before = torch.cat([before, frames.x[start:stop]])
        before = before[max(0, len(before) - reach) :]
        frames.x[start // squeeze : stop // squeeze] = front.input_norm(front.with_positions(seen)[:, own])[0]
        done(0)  # its work is counted with the convolutions'
    frames.squeeze(squeeze)
