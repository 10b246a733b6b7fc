"""Audio files in and out: whatever `AudioFile` reads becomes float32, mono, 16 kHz."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from cald_speech.audio_files import UNKNOWN_LENGTH, AudioFile
from cald_speech.audio_files.resampling import Resampler
from cald_speech.errors import UserError
from cald_speech.files import whole_file

SAMPLE_RATE = 16_000
# The receptive field of one frame of the wav2vec2 front end, 25 ms: shorter audio gives no frame at all.
MIN_SAMPLES = 400
# Manifests keep starts and durations to 0.1 ms, so that their sum may be so much beyond the end of the file.
_ROUNDING_S = 2e-4
_SAMPLES_AT_ONCE = 2**16


class AudioError(UserError):
    """An audio file that cannot be used; the message names it."""


def audio_info(path: str | Path) -> tuple[int, int]:
    """Look up how long an audio file is: (samples per channel at its own rate, its rate in Hz).

    The header tells where it can be believed; else (MP3, what was written to a pipe) the file is decoded.

    Raises: AudioError, where the file is missing, not audio, or ends before its header says (FLAC: see `ends_early`).

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.flac"
    >>> write_audio(path, torch.zeros(16_000))
    >>> audio_info(path)
    (16000, 16000)
    """
    file = _open(path)
    while file.num_samples == UNKNOWN_LENGTH:
        file.read(_SAMPLES_AT_ONCE)
    _refuse_faults(file)
    return file.num_samples, file.rate


def ends_early(path: str | Path) -> bool:
    """Whether the last sample cannot be had. A FLAC file's header says nothing of how many bytes follow it."""
    try:
        with soundfile.SoundFile(str(path)) as file:
            file.seek(max(0, file.frames - 1))
            return len(file.read(1)) < min(1, file.frames)
    except (soundfile.LibsndfileError, TypeError):
        return True


def read_audio(
    path: str | Path, *, min_samples: int = MIN_SAMPLES, start_s: float = 0.0, duration_s: float | None = None
) -> torch.Tensor:
    """Read an audio file, or a segment of it, as (N,) float32 mono at 16 kHz, full scale being 1.

    More channels are averaged, other rates are resampled. `min_samples` counts at 16 kHz. Of a segment of `duration_s`
    seconds from `start_s` on (None: to the end) nothing else is kept, and where the format allows it nothing else is
    decoded, so that a long recording is never in memory; where the rate is another one, the resampling filter does not
    see beyond the segment's edges.

    Raises: AudioError, where the file is missing, unreadable, truncated, empty, too short, holds NaN or infinity, or
    ends before the segment does.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "stereo.wav"
    >>> soundfile.write(path, np.zeros((8_000, 2)), 8_000)
    >>> read_audio(path).shape, read_audio(path, start_s=0.25, duration_s=0.5).shape
    (torch.Size([16000]), torch.Size([8000]))
    """
    is_whole = start_s == 0 and duration_s is None
    file = _open(path)
    _refuse_faults(file)
    mono = _all_of(file) if is_whole else _segment(file, start_s, duration_s)
    if not np.isfinite(mono).all():
        raise AudioError(f"{path}: expected finite samples, but some are NaN or infinite. {_MEND}")
    audio = to_16_khz(torch.from_numpy(mono), file.rate)
    if len(audio) < min_samples:
        came = f"has {len(audio)}" if len(audio) else "is empty"
        raise AudioError(
            f"{path}: expected at least {min_samples} samples at 16 kHz ({1000 * min_samples / SAMPLE_RATE:g} ms, one "
            f"frame of the speech encoder), but the {'file' if is_whole else 'segment'} {came}. Leave this utterance "
            "out of the data."
        )
    return audio


def _open(path: str | Path) -> AudioFile:
    try:
        return AudioFile(path)
    except UserError as error:
        raise AudioError(f"{str(error).rstrip('.')}. {_MEND}") from error


def _refuse_faults(file: AudioFile) -> None:
    if file.fault is not None:
        raise AudioError(f"{file.path}: {file.fault.message}, at {file.fault.time_s:.2f} s. {_MEND}")


def _all_of(file: AudioFile) -> np.ndarray:
    """What is left of the file."""
    parts = []
    while len(part := file.read(_SAMPLES_AT_ONCE)):
        parts.append(part)
    _refuse_faults(file)
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _segment(file: AudioFile, start_s: float, duration_s: float | None) -> np.ndarray:
    """The samples of a segment at the file's own rate; nothing before them is decoded where the file can seek."""
    end_s = 0.0 if duration_s is None else start_s + duration_s
    while file.num_samples == UNKNOWN_LENGTH and (duration_s is None or file.at < end_s * file.rate):
        file.read(_SAMPLES_AT_ONCE)  # only so far that the segment is known to be there
    _refuse_faults(file)
    num_samples = file.num_samples
    first, count = _extent(file.path, num_samples, file.rate, start_s, duration_s)
    file.rewind()
    file.skip(first)
    mono = file.read(count)
    _refuse_faults(file)
    if len(mono) < count:
        raise AudioError(
            f"{file.path}: the header promises {num_samples} samples, but only {first + len(mono)} are there. {_MEND}"
        )
    return mono


def read_entry(entry: Mapping[str, Any]) -> torch.Tensor:
    """The audio of a manifest's entry: its whole file, or with "start_s" the segment; as `read_audio`."""
    if "start_s" not in entry:
        return read_audio(entry["audio"])
    return read_audio(entry["audio"], start_s=entry["start_s"], duration_s=entry["duration_s"])


def _extent(path: str | Path, num_samples: int, rate: int, start_s: float, duration_s: float | None) -> tuple[int, int]:
    """The first sample of a segment and how many there are, at the file's own rate."""
    end_s = num_samples / rate if duration_s is None else start_s + duration_s
    if not 0 <= start_s < end_s:
        raise ValueError(f"expected 0 <= start_s, and duration_s > 0 within the file, got {start_s} and {duration_s}")
    if end_s > num_samples / rate + _ROUNDING_S:
        raise AudioError(
            f"{path}: expected a segment from {start_s:g} to {end_s:g} s, but the file ends at {num_samples / rate:g} "
            f"s. {_MEND}"
        )
    first = round(start_s * rate)
    return first, min(round(end_s * rate), num_samples) - first


def to_16_khz(audio: torch.Tensor, rate: int) -> torch.Tensor:
    """Resample (N,) float32 from `rate` Hz to 16 kHz.

    It runs on one thread: a few seconds of sound gain nothing from more, and where other work keeps the cores busy,
    waiting for the other threads takes five times as long. The samples are the same.

    Example
    -------
    >>> to_16_khz(torch.zeros(8_000), 8_000).shape
    torch.Size([16000])
    """
    if rate == SAMPLE_RATE or not len(audio):
        return audio
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resampler = Resampler(rate, SAMPLE_RATE)
        return resampler(audio, 0, 0, resampler.num_outputs(len(audio)))
    finally:
        torch.set_num_threads(num_threads)


def write_audio(path: str | Path, samples: torch.Tensor) -> None:
    """Write (N,) samples at 16 kHz, full scale being 1, as 16-bit PCM; the ending chooses FLAC or WAV. Atomic.

    Samples beyond full scale are clipped. Raises: OSError, where the file cannot be written.
    """
    path, encoded = Path(path), io.BytesIO()
    # By way of memory: where a disk is full, libsndfile may lose what it has buffered, and say nothing.
    soundfile.write(encoded, samples.numpy(), SAMPLE_RATE, subtype="PCM_16", format=path.suffix.lstrip(".").upper())
    with whole_file(path, durable=False) as unfinished:  # a corpus has thousands: see files.settle
        unfinished.write_bytes(encoded.getvalue())


_MEND = "Copy or download the file again, or leave this utterance out of the data."
