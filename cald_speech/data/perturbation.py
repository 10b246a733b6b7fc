"""Speed and noise: other voices and rooms than a small training set has, made as its batches are read.

:class:`Perturbation` is our own; :class:`SpeechBrainAugmentation` takes augmenters of SpeechBrain's.
"""

import copy
import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torchaudio.functional import resample

from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.errors import UserError


@dataclass(frozen=True)
class Perturbation:
    """Changes the utterances of a training batch, each in its own way.

    What is drawn depends on the batch alone: a resumed run, and a loader with workers, draw the same.

    Arguments
    ---------
    speeds : an utterance is played at one of these speeds, its pitch moving with it; 1.1 is faster. Steps of 0.05.
    noisy : the share of utterances that get noise; its power falls with the frequency, by 0 (hiss) to 6 dB (rumble)
        an octave.
    snr_db : between these signal-to-noise ratios, in decibels.

    Example
    -------
    >>> items = [{"id": "a", "wav": torch.randn(16_000), "duration_s": 1.0}]
    >>> Perturbation(speeds=[0.8])(items, seed=0)[0]["wav"].shape
    torch.Size([20000])
    """

    speeds: Sequence[float] = (1.0,)
    noisy: float = 0.0
    snr_db: tuple[float, float] = (5.0, 25.0)

    def __post_init__(self) -> None:
        if not self.speeds or any(not 0.5 <= s <= 2 or abs(20 * s - round(20 * s)) > 1e-6 for s in self.speeds):
            raise UserError(f"speeds: expected one or more of 0.5 to 2 in steps of 0.05, got {list(self.speeds)}")
        if not 0 <= self.noisy <= 1:
            raise UserError(f"noisy: expected a share from 0 to 1, got {self.noisy}")
        if len(self.snr_db) != 2:
            raise UserError(f"snr_db: expected the lowest and the highest ratio, got {self.snr_db}")

    def __call__(self, items: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
        """The same items with other sound, of the mean and the variance that it had; ``seed`` draws everything."""
        generator = Generator().manual_seed(seed)
        return [self._perturbed(item, generator) for item in items]

    def _perturbed(self, item: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
        speed = self.speeds[int(_uniform(0, len(self.speeds), generator))]
        original = item["wav"]
        wave = resample(original, round(20 * speed), 20)
        if _uniform(0, 1, generator) < self.noisy:
            noise = coloured_noise(len(wave), _uniform(0, 6, generator), generator)
            wave = wave + wave.std() * 10 ** (-_uniform(*self.snr_db, generator) / 20) * noise
        wave = (wave - wave.mean()) / (wave.std() + 1e-7) * original.std() + original.mean()
        return {**item, "wav": wave, "duration_s": len(wave) / SAMPLE_RATE}


class SpeechBrainAugmentation:
    """Changes each utterance of a training batch by augmenters of SpeechBrain's (``speechbrain.augment``), in order.

    They draw from the process's generators, and some keep a place in a list of noises. Here every batch begins with
    augmenters as they were made, and generators seeded for it: what is drawn depends on the batch alone, as with
    :class:`Perturbation`.

    Arguments
    ---------
    augmenters : modules from (1, N) samples at 16 kHz, some with the (1,) share of them that is no padding, to (1, M).
    share : of the utterances, those that are changed.

    Example
    -------
    >>> from speechbrain.augment.time_domain import SpeedPerturb
    >>> items = [{"id": "a", "wav": torch.randn(16_000), "duration_s": 1.0}]
    >>> augmentation = SpeechBrainAugmentation([SpeedPerturb(orig_freq=16_000, speeds=[80])])
    >>> augmentation(items, seed=0)[0]["wav"].shape
    torch.Size([20000])
    """

    def __init__(self, augmenters: Sequence[nn.Module], share: float = 1.0):
        if not augmenters or not all(isinstance(one, nn.Module) for one in augmenters):
            raise UserError(f"augmenters: expected one or more modules of speechbrain.augment, got {augmenters!r}")
        if not 0 <= share <= 1:
            raise UserError(f"share: expected one from 0 to 1, got {share}")
        self.augmenters, self.share = list(augmenters), share
        self.take_lengths = ["lengths" in inspect.signature(one.forward).parameters for one in augmenters]

    def __call__(self, items: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
        """The same items with other sound; ``seed`` draws everything, and the process's generators stay as they are."""
        python, numpy = random.getstate(), np.random.get_state()
        augmenters = copy.deepcopy(self.augmenters)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)
                return [self._augmented(item, augmenters) for item in items]
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

    def _augmented(self, item: Mapping[str, Any], augmenters: Sequence[nn.Module]) -> dict[str, Any]:
        if torch.rand(()).item() >= self.share:
            return dict(item)
        wave = item["wav"][None]
        for augmenter, takes_lengths in zip(augmenters, self.take_lengths, strict=True):
            wave = augmenter(wave, torch.ones(1)) if takes_lengths else augmenter(wave)
        if wave.dim() != 2 or len(wave) != 1 or not wave.numel():
            raise UserError(f"augmenters: expected them to make (1, M) samples of (1, N), got {tuple(wave.shape)}")
        return {**item, "wav": wave[0], "duration_s": wave.size(1) / SAMPLE_RATE}


def coloured_noise(num_samples: int, db_per_octave: float, generator: Generator) -> Tensor:
    """(num_samples,) Gaussian noise of standard deviation 1, whose power falls by so much with the frequency.

    Example
    -------
    >>> coloured_noise(16_000, 3.0, torch.Generator().manual_seed(0)).std().round(decimals=3)
    tensor(1.)
    """
    size = 1 << (max(2, num_samples) - 1).bit_length()  # fast to transform
    spectrum = torch.fft.rfft(torch.randn(size, generator=generator))
    spectrum[0] = 0
    spectrum[1:] *= torch.arange(1, len(spectrum)) ** (-db_per_octave / 6.02)
    noise = torch.fft.irfft(spectrum, size)[:num_samples]
    return noise / noise.std()


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()
