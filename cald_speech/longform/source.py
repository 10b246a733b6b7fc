"""Audio of any length, read in parts: whatever ``cald_speech.audio_files`` reads becomes float32, mono, 16 kHz.

The samples are those of ``cald_speech.data.audio.read_audio``. That reader refuses a damaged file; this one gives what
can be read, and says afterwards what was wrong and from which second on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cald_speech.audio_files import AudioFile, Fault
from cald_speech.audio_files.resampling import Resampler

SAMPLE_RATE = 16_000


class AudioSource:
    """One audio signal, of which never more than the part asked for is in memory.

    ``num_samples`` counts at 16 kHz. For a file it is what the header says until a fault is met; then it is what can be
    read, and ``fault`` says why. (MP3 and what was written to a pipe do not know their length: it is then huge until
    the end was read.) Parts are best read in order, overlapping or not: going back decodes the file from its start
    again. Not for use by several threads at once.

    Example
    -------
    >>> source = AudioSource.from_samples(torch.randn(40_000))
    >>> source.num_samples, source.duration_s
    (40000, 2.5)
    >>> source.read(39_000, 50_000).shape
    torch.Size([1000])
    >>> [part.numel() for part in source.blocks(16_000)]
    [16000, 16000, 8000]
    """

    def __init__(self, reader: "SampleReader | FileReader"):
        self._reader = reader
        self._resampler = Resampler(reader.rate, SAMPLE_RATE)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """A file in any format, rate and number of channels that ``AudioFile`` reads; the channels are averaged.

        Raises UserError where there is no such file or it is not audio at all.
        """
        return cls(FileReader(Path(path)))

    @classmethod
    def from_samples(cls, samples: Tensor, sample_rate: int = SAMPLE_RATE) -> Self:
        """(N,) floating point samples, full scale being 1."""
        if samples.dim() != 1 or not samples.is_floating_point():
            raise ValueError(f"samples: expected float (N,), got {samples.dtype} of shape {tuple(samples.shape)}")
        return cls(SampleReader(samples, sample_rate))

    @property
    def num_samples(self) -> int:
        """Samples at 16 kHz."""
        return self._resampler.num_outputs(self._reader.num_samples)

    @property
    def duration_s(self) -> float:
        return self._reader.num_samples / self._reader.rate

    @property
    def fault(self) -> Fault | None:
        """What kept the rest of a file from being read; None while nothing did."""
        return self._reader.fault

    @property
    def note(self) -> str | None:
        """What can never be known of a file of this kind (whether it is whole, where nothing says its length)."""
        return self._reader.note

    def read(self, start: int, stop: int) -> Tensor:
        """Samples [start, stop) at 16 kHz, fewer where the audio ends before: (<= stop - start,) float32."""
        if not 0 <= start <= stop:
            raise ValueError(f"start, stop: expected 0 <= start <= stop, got {start}, {stop}")
        stop = min(stop, self.num_samples)
        if start >= stop:
            return torch.empty(0)
        first, last = self._resampler.inputs(start, stop)
        first = max(0, first)
        # What comes back is shorter where a fault turned up just now, and the end is then nearer.
        native = self._reader.read(first, min(last, self._reader.num_samples))
        stop = min(stop, self.num_samples)
        return self._resampler(native, first, start, stop) if start < stop else torch.empty(0)

    def blocks(self, block_samples: int, halo: int = 0) -> Iterator[Tensor]:
        """All samples in order, ``block_samples`` at a time, each time with up to ``halo`` more to either side."""
        start = 0
        while start < self.num_samples:
            yield self.read(max(0, start - halo), start + block_samples + halo)
            start += block_samples


class SampleReader:
    """A signal that is in memory already, at its own rate."""

    fault: Fault | None = None
    note: str | None = None

    def __init__(self, samples: Tensor, rate: int):
        self.samples, self.rate = samples.detach().cpu(), rate
        self.num_samples = samples.numel()

    def read(self, start: int, stop: int) -> Tensor:
        return self.samples[start:stop].float()


class FileReader:
    """A file at its own rate, decoded from its start on; it keeps the last part that was asked for.

    The file is decoded in the same small blocks in every pass, so that every pass meets a fault at the same sample.
    """

    SAMPLES_PER_DECODING = 1024

    def __init__(self, path: Path):
        self._file = AudioFile(path)
        self.rate = self._file.rate
        self._kept_from, self._kept = 0, np.empty(0, np.float32)

    @property
    def num_samples(self) -> int:
        return self._file.num_samples

    @property
    def note(self) -> str | None:
        return self._file.note

    @property
    def fault(self) -> Fault | None:
        return self._file.fault

    def read(self, start: int, stop: int) -> Tensor:
        """Samples [start, stop), fewer where the file ends before."""
        if start < self._kept_from:
            self._file.rewind()
            self._kept_from, self._kept = 0, self._kept[:0]
        parts, at = [self._kept], self._kept_from + len(self._kept)
        while at < stop:
            block = self._file.read(self.SAMPLES_PER_DECODING)
            if not len(block):
                break
            parts = [*parts, block] if at > start else [*parts[-1:], block]
            at += len(block)
        everything = np.concatenate(parts)
        self._kept = everything[max(0, start - (at - len(everything))) :]
        self._kept_from = at - len(self._kept)
        return torch.from_numpy(self._kept[: stop - start])
