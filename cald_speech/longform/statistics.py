"""What must be known of all of the audio before its first frame: one pass over the samples gathers everything.

The input is normalised to mean 0 and variance 1; in GroupNorm models (wav2vec2-base and its kin) each channel of the
first convolution's output y = w * x + b is normalised over time. Both follow from sums over x: with windows
u_t = x[s t : s t + K] under the kernel of size K and stride s,

    mean(y) = w . mean(u) + b        var(y) = w^T cov(u) w

so that K + K^2 sums in float64 stand for a run of the convolution over hours.
"""

import torch
from torch import Tensor

from cald_speech.families import FrontEnd, Moments

# transformers' feature extractor adds it to the variance of the input.
INPUT_EPS = 1e-7


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
