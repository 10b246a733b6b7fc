"""Noise to mix into speech. All signals are (N,) float32 numpy arrays; all generators are numpy's."""

from collections.abc import Sequence

import numpy as np


def white(num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Equal power at all frequencies (a hiss); standard deviation 1."""
    return generator.standard_normal(num_samples, dtype=np.float32)


def pink(num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Power falling as 1/f (wind, traffic); standard deviation 1.

    Example
    -------
    >>> pink(16_000, np.random.default_rng(0)).dtype
    dtype('float32')
    """
    spectrum = np.fft.rfft(generator.standard_normal(num_samples))
    spectrum[0] = 0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return _unit(np.fft.irfft(spectrum, num_samples))


def babble(num_samples: int, voices: Sequence[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Several people talking at once: `voices`, each repeated and begun at a random place; standard deviation 1."""
    total = np.zeros(num_samples)
    for voice in voices:
        total += np.resize(np.roll(voice, generator.integers(len(voice))), num_samples)
    return _unit(total)


def mix(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add `noise` (standard deviation 1) to `speech` at a ratio of mean powers of `snr_db` decibels.

    Example
    -------
    >>> mix(np.ones(4, np.float32), np.ones(4, np.float32), snr_db=20.0)
    array([1.1, 1.1, 1.1, 1.1], dtype=float32)
    """
    level = np.sqrt(np.mean(np.square(speech, dtype=np.float64))) * 10 ** (-snr_db / 20)
    return (speech + level * noise).astype(np.float32)


def _unit(signal: np.ndarray) -> np.ndarray:
    return (signal / (signal.std() + 1e-12)).astype(np.float32)
