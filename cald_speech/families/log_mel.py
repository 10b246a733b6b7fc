"""Log-mel features of audio of any length, piece by piece: what models hear that take no samples.

A feature frame is made of the samples in its own window alone; then each channel is brought to mean 0 and variance 1
over all of the audio.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import SeamlessM4TFeatureExtractor, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.models.parakeet.feature_extraction_parakeet import EPSILON, LOG_ZERO_GUARD_VALUE


class LogMel:
    """What a feature extractor makes of samples at 16 kHz; a subclass is of one extractor, with its own settings.

    A frame has ``window`` samples, the first one's from ``lead`` before the audio, where there are zeros, and the next
    one's ``hop`` later.
    """

    window: int
    hop: int
    lead: int = 0
    # What the extractor must be told: with other values its features are others.
    settings: ClassVar[dict[str, float]]

    def __init__(self, channels: int):
        self.channels = channels

    def num_frames(self, num_samples: int) -> int:
        """Frames of so many samples."""
        return max(0, (num_samples - self.window) // self.hop + 1)

    def __call__(self, samples: Tensor, *, ended: bool = False) -> Tensor:
        """(n,) samples, from a frame's first on, to the frames that they hold: (t, channels) float32.

        ``ended`` says that they are the audio's last.
        """
        raise NotImplementedError

    def normalised(self, features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Features brought to size by what is known of all of the audio, float32."""
        raise NotImplementedError

    def unlike(self, extractor: SequenceFeatureExtractor) -> list[str]:
        """The settings of a feature extractor in which it is another than this one, for people."""
        own = {"feature_size": self.channels, **self.settings}
        has = {name: getattr(extractor, name, None) for name in own}
        return [f"{name}: {has[name]} (expected {value})" for name, value in own.items() if has[name] != value]


class SeamlessLogMel(LogMel):
    """What `SeamlessM4TFeatureExtractor` makes of samples, before two frames become one of the model's.

    Example
    -------
    >>> SeamlessLogMel(80)(torch.randn(400 + 160)).shape
    torch.Size([2, 80])
    """

    window, hop = 400, 160
    settings: ClassVar = {"stride": 2}
    EPS = 1e-7  # what the feature extractor adds to the variance

    def __init__(self, channels: int):
        super().__init__(channels)
        self.extractor = SeamlessM4TFeatureExtractor(feature_size=channels, num_mel_bins=channels)

    def __call__(self, samples: Tensor, *, ended: bool = False) -> Tensor:
        if samples.numel() < self.window:
            return torch.zeros(0, self.channels)
        return torch.from_numpy(
            self.extractor._extract_fbank_features(samples.float().cpu().numpy()).astype(np.float32)
        )

    def normalised(self, features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return ((features.double() - mean) * (variance + self.EPS).rsqrt()).float()


class ParakeetLogMel(LogMel):
    """What `ParakeetFeatureExtractor` makes of samples.

    A frame stands in the middle of its window: the first one hears zeros before the audio, the last ones zeros behind
    it. Each sample but the first has 0.97 times the one before it taken from it, so that a window needs one more. Of n
    samples, whole hops alone are counted as frames.

    Example
    -------
    >>> log_mel, samples = ParakeetLogMel(80), torch.randn(1600)
    >>> log_mel(torch.cat([torch.zeros(log_mel.lead), samples]), ended=True).shape, log_mel.num_frames(1600)
    (torch.Size([10, 80]), 10)
    """

    HALF = 256  # of a transform
    window, hop, lead = 1 + 2 * HALF, 160, 1 + HALF
    settings: ClassVar = {"hop_length": 160, "n_fft": 512, "win_length": 400, "preemphasis": 0.97}

    def __init__(self, channels: int):
        super().__init__(channels)
        # The extractor itself asks for librosa in some releases of transformers.
        bands = {"num_frequency_bins": self.HALF + 1, "num_mel_filters": channels, "sampling_rate": 16_000}
        slaney = {"norm": "slaney", "mel_scale": "slaney"}
        filters = mel_filter_bank(min_frequency=0.0, max_frequency=8_000.0, **bands, **slaney)
        self.filters = torch.from_numpy(filters.T.astype(np.float32))

    def num_frames(self, num_samples: int) -> int:
        return num_samples // self.hop

    def __call__(self, samples: Tensor, *, ended: bool = False) -> Tensor:
        samples = samples.float().cpu()
        y = samples[1:] - self.settings["preemphasis"] * samples[:-1]
        heard = y.numel() - self.HALF  # from the middle of the first frame on
        if ended:
            count = max(0, heard) // self.hop
            y = torch.cat([y, y.new_zeros(self.HALF)])
        else:
            count = max(0, (heard - self.HALF) // self.hop + 1)
        if not count:
            return torch.zeros(0, self.channels)
        size = self.settings["win_length"]
        window = torch.hann_window(size, periodic=False)
        options = {"hop_length": self.hop, "win_length": size, "center": False, "return_complex": True}
        spectrum = torch.stft(y, 2 * self.HALF, window=window, **options)[:, :count]
        power = torch.view_as_real(spectrum).square().sum(-1)
        return (self.filters @ power + LOG_ZERO_GUARD_VALUE).log().t()

    def normalised(self, features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return ((features.double() - mean) / (variance.sqrt() + EPSILON)).float()
