"""Audio files in and out: whatever soundfile reads becomes float32, mono, 16 kHz."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from cald_speech.errors import UserError
from cald_speech.files import whole_file

SAMPLE_RATE = 16_000
# The receptive field of one frame of the wav2vec2 front end, 25 ms: shorter audio gives no frame at all.
MIN_SAMPLES = 400
_UNKNOWN_SIZE = 0xFFFFFFFF


class AudioError(UserError):
    """An audio file that cannot be used; the message names it."""


def audio_info(path: str | Path) -> tuple[int, int]:
    """Read the header of an audio file: (samples per channel at its own rate, its rate in Hz).

    Raises: AudioError, where the file is missing, not audio, or ends before its header says.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.flac"
    >>> write_audio(path, torch.zeros(16_000))
    >>> audio_info(path)
    (16000, 16000)
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: there is no such audio file. Check the path, or prepare the data again.")
    _refuse_cut_off_wav(path)
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path}: expected an audio file, but it cannot be read ({error.error_string}). {_MEND}"
        ) from error
    return info.frames, info.samplerate


def read_audio(path: str | Path, *, min_samples: int = MIN_SAMPLES) -> torch.Tensor:
    """Read a whole audio file as (N,) float32 mono at 16 kHz, full scale being 1.

    More channels are averaged, other rates are resampled. `min_samples` counts at 16 kHz.

    Raises: AudioError, where the file is missing, unreadable, truncated, empty, too short, or holds NaN or infinity.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "stereo.wav"
    >>> soundfile.write(path, np.zeros((8_000, 2)), 8_000)
    >>> read_audio(path).shape
    torch.Size([16000])
    """
    num_samples, rate = audio_info(path)
    try:
        samples, _ = soundfile.read(str(path), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: the audio is damaged or cut off ({error.error_string}). {_MEND}") from error
    if len(samples) < num_samples:
        raise AudioError(
            f"{path}: the header promises {num_samples} samples, but only {len(samples)} are there. {_MEND}"
        )
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError(f"{path}: expected finite samples, but some are NaN or infinite. {_MEND}")
    audio = torch.from_numpy(mono)
    if num_samples > 0:
        audio = to_16_khz(audio, rate)
    if len(audio) < min_samples:
        came = "is empty" if num_samples == 0 else f"has {len(audio)}"
        raise AudioError(
            f"{path}: expected at least {min_samples} samples at 16 kHz ({1000 * min_samples / SAMPLE_RATE:g} ms, one "
            f"frame of the speech encoder), but the file {came}. Leave this utterance out of the data."
        )
    return audio


def to_16_khz(audio: torch.Tensor, rate: int) -> torch.Tensor:
    """Resample (N,) float32 from `rate` Hz to 16 kHz.

    It runs on one thread: a few seconds of sound gain nothing from more, and where other work keeps the cores busy,
    waiting for the other threads takes five times as long. The samples are the same.

    Example
    -------
    >>> to_16_khz(torch.zeros(8_000), 8_000).shape
    torch.Size([16000])
    """
    if rate == SAMPLE_RATE:
        return audio
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return resample(audio, rate, SAMPLE_RATE)
    finally:
        torch.set_num_threads(num_threads)


def write_audio(path: str | Path, samples: torch.Tensor) -> None:
    """Write (N,) samples at 16 kHz, full scale being 1, as 16-bit PCM; the ending chooses FLAC or WAV. Atomic.

    Samples beyond full scale are clipped. Raises: OSError, where the file cannot be written.
    """
    with whole_file(path) as unfinished:
        soundfile.write(str(unfinished), samples.numpy(), SAMPLE_RATE, subtype="PCM_16")


_MEND = "Copy or download the file again, or leave this utterance out of the data."


def _refuse_cut_off_wav(path: Path) -> None:
    # libsndfile shortens a WAV file to what is there and says nothing. FLAC decoding fails by itself.
    with path.open("rb") as file:
        header = file.read(8)
    declared = int.from_bytes(header[4:8], "little")
    # Programs that stream to a pipe cannot know the size and leave 0 or all ones.
    if header[:4] == b"RIFF" and declared not in (0, _UNKNOWN_SIZE) and declared + 8 > path.stat().st_size:
        missing = declared + 8 - path.stat().st_size
        raise AudioError(f"{path}: the audio is cut off, {missing} of the {declared + 8} bytes are missing. {_MEND}")
