"""Log-mel features of audio of any length, piece by piece: what models hear that take no samples.

A feature frame is made of its own 400 samples alone; then each channel is brought to mean 0 and variance 1 over all of
the audio, and two frames become one of the model's.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import SeamlessM4TFeatureExtractor

WINDOW, HOP, STACKED = 400, 160, 2  # samples of a frame, from one to the next, and frames of one of the model's
EPS = 1e-7  # what the feature extractor adds to the variance


class LogMel:
    """What `SeamlessM4TFeatureExtractor` makes of samples.

    Example
    -------
    >>> LogMel(80)(torch.randn(400 + 160)).shape
    torch.Size([2, 80])
    """

    def __init__(self, channels: int):
        self.channels = channels
        self.extractor = SeamlessM4TFeatureExtractor(feature_size=channels, num_mel_bins=channels)

    def __call__(self, samples: Tensor) -> Tensor:
        """(n,) samples at 16 kHz to all frames that they hold, (t, channels) float32; fewer than 400 hold none."""
        if samples.numel() < WINDOW:
            return torch.zeros(0, self.channels)
        return torch.from_numpy(
            self.extractor._extract_fbank_features(samples.float().cpu().numpy()).astype(np.float32)
        )

    def samples_of(self, num_frames: int) -> int:
        """Samples from the beginning of a frame to that of the one ``num_frames`` later."""
        return num_frames * HOP

    def stacked(self, samples: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """(n,) samples to the model's frames, normalised by what is known of all of the audio: (1, t, 2 channels)."""
        features = self(samples).double()
        features = ((features - mean) * (variance + EPS).rsqrt()).float()
        return features[: len(features) // STACKED * STACKED].reshape(1, -1, STACKED * self.channels)
