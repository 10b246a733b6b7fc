"""One audio file, decoded from its start to its real end: float32, mono, at its own rate."""

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from cald_speech.audio_files.containers import layout
from cald_speech.audio_files.parts import Part
from cald_speech.errors import UserError
from cald_speech.files import is_pointer

try:
    import av
except ImportError:  # of the extra `formats`
    av = None

# Speech is recorded at 8 to 48 kHz. Beyond these a header is wrong, and resampling would take memory and time.
RATES = range(1_000, 384_001)
UNKNOWN_LENGTH = 2**61  # samples
# All channels together, at once: what a header says decides no memory.
NUMBERS_AT_ONCE = 2**18
# Where a file was cut out of a longer one, the first frames need what is not there and give no samples.
MPEG_SLACK = 10 * 1152
# What libsndfile tells by the ending alone, and a second file beside (SD2): they are opened by name.
_NO_LENGTH = ("IRCAM", "PVF", "PAF", "SD2", "XI")
WITHOUT_HEADER = (".raw", ".pcm")
_BY_NAME = (".vox", ".gsm", ".sd2")
# What libsndfile cannot read, by its first bytes, and ffmpeg's name of it: a file chooses no other of ffmpeg's readers,
# some of which open further files.
BY_AV = {
    b"\x1a\x45\xdf\xa3": "matroska",
    b"\xff\xf1": "aac",
    b"\xff\xf9": "aac",
    b"\x30\x26\xb2\x75": "asf",
    b"#!AMR": "amr",
    b"FLV\1": "flv",
    b"wvpk": "wv",
    b"MAC ": "ape",
    b"TTA1": "tta",
    b"\x0b\x77": "ac3",
    b"RIFF": "wav",
    b"OggS": "ogg",
    b"caff": "caf",
}


class Fault(NamedTuple):
    """What is wrong with a file, and the second up to which it could be read."""

    time_s: float
    message: str


class AudioFile:
    """A file that is read through. Passes in the same blocks give the same samples and the same fault.

    ``num_samples``, at the file's own ``rate``, is what is known of the length: ``UNKNOWN_LENGTH`` until the end was
    read where the header does not tell or is not believed. Where a fault is met it is what can be read, and ``fault``
    says why. Nothing seeks: in MP3 and Ogg files the samples after a seek are others than those of reading through.

    Raises
    ------
    UserError
        where there is no such file, it is no audio, or its rate is beyond ``RATES``.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.wav"
    >>> soundfile.write(path, np.zeros((8_000, 2)), 8_000)
    >>> file = AudioFile(path)
    >>> file.rate, file.num_samples, len(file.read(5_000)), len(file.read(5_000)), file.fault
    (8000, 8000, 5000, 3000, None)
    """

    def __init__(self, path: str | Path):
        self.path, self.fault = Path(path), None
        if not os.path.isfile(path):  # which takes names that no file can have
            if os.path.exists(path):
                raise UserError(f"{path}: expected an audio file, got a folder, a pipe or a device. Write it to a file")
            raise UserError(f"{path}: there is no such audio file. Check the path")
        try:
            self._layout = layout(self.path)
        except OSError as error:
            raise UserError(f"{path}: expected an audio file, but it cannot be opened ({error.strerror})") from error
        self.num_samples = UNKNOWN_LENGTH
        self.rewind()
        self.rate = self._decoder.rate
        if self.rate not in RATES:
            raise UserError(
                f"{path}: expected audio at {RATES.start:,} to {RATES.stop - 1:,} Hz, but its header says "
                f"{self.rate:,} Hz. Convert it, or copy it again"
            )
        is_plain = not self._layout.parts and self._decoder.num_samples < UNKNOWN_LENGTH
        if is_plain and not self._decoder.is_mpeg:
            self.num_samples = min(self._decoder.num_samples, self._layout.most_samples)
            if self._layout.fault:
                self._end(self._layout.fault, self.num_samples)

    @property
    def note(self) -> str | None:
        """What can never be known of a file of this kind; None for most."""
        form = getattr(self._decoder, "format", None)
        return (
            f"{form} files do not say how long they are: nothing shows whether all is there"
            if form in _NO_LENGTH
            else None
        )

    def rewind(self) -> None:
        """Start again from the first sample."""
        self.at = 0
        self._open(0)

    def skip(self, count: int) -> None:
        """Leave out the next ``count`` samples; where libsndfile finds any sample exactly, without decoding them."""
        is_exact = isinstance(self._decoder, _Sndfile) and not self._layout.parts and not self._decoder.is_mpeg
        if is_exact and self.at + count <= self._decoder.num_samples < UNKNOWN_LENGTH:
            try:
                self.at = self._decoder.seek(self.at + count)
            except soundfile.LibsndfileError as error:
                self._end(f"the audio is damaged or cut off ({_reason(error)})", self.at)
            return
        while count > 0 and len(samples := self.read(min(count, NUMBERS_AT_ONCE))):
            count -= len(samples)

    def read(self, count: int) -> np.ndarray:
        """The next ``count`` samples, fewer where the audio ends."""
        got = [np.empty(0, np.float32)]
        while (wanted := min(count - sum(map(len, got)), self.num_samples - self.at)) > 0:
            samples = self._decode(wanted)
            if samples is None:
                break
            got.append(samples)
            self.at += len(samples)
        return np.concatenate(got)

    def _open(self, part: int) -> None:
        self._part, self._part_from = part, self.at
        parts = self._layout.parts
        self._decoder = _open(self.path, parts[part] if parts else None)

    def _decode(self, count: int) -> np.ndarray | None:
        """Samples of this part, none where it ends and another follows, None where the audio ends."""
        try:
            samples = self._decoder.read(min(count, max(1, NUMBERS_AT_ONCE // self._decoder.channels)))
        except _DAMAGE as error:
            return self._end(f"the audio is damaged or cut off ({_reason(error)})", self.at)
        if not len(samples):
            return self._next_part()
        mono = samples.mean(axis=1)
        finite = np.isfinite(mono)
        if not finite.all():
            mono = mono[: finite.argmin()]
            self._end("the samples are NaN or infinite", self.at + len(mono))
        return mono

    def _next_part(self) -> np.ndarray | None:
        promised = self._decoder.num_samples
        slack = MPEG_SLACK if self._decoder.is_mpeg else 0
        if promised < UNKNOWN_LENGTH and self.at - self._part_from < promised - slack:
            message = f"the header promises {promised / self.rate:.2f} s, but there is no more"
            return self._end(self._layout.fault or message, self.at)
        if self._part + 1 >= len(self._layout.parts):
            return self._end(self._layout.fault, self.at)
        try:
            self._open(self._part + 1)
        except UserError:
            return self._end("what is joined here cannot be read", self.at)
        if self._decoder.rate != self.rate:
            return self._end(f"what is joined here has {self._decoder.rate} Hz, not {self.rate}", self.at)
        return np.empty(0, np.float32)

    def _end(self, message: str | None, num_samples: int) -> None:
        """The file is good up to so many samples; without a message that is its end."""
        self.num_samples = num_samples
        self.fault = Fault(num_samples / self.rate, message) if message else None


class _Sndfile(soundfile.SoundFile):
    """A file that libsndfile reads through. soundfile would seek to where it stands after every read."""

    def __init__(self, file: "bytes | io.BufferedReader | _View"):
        self._kept_open = file  # libsndfile has its number alone
        if isinstance(file, io.BufferedReader):
            super().__init__(file.fileno(), closefd=False)
        else:
            super().__init__(file)
        self.rate, self.num_samples = self.samplerate, min(self.frames, UNKNOWN_LENGTH)
        self.is_mpeg = self.subtype.startswith("MPEG") and self.format == "MP3"

    def seekable(self) -> bool:
        return False

    def read(self, count: int) -> np.ndarray:
        return super().read(count, dtype="float32", always_2d=True)


class _View:
    """A part of a file as a file: what soundfile asks of one."""

    def __init__(self, path: Path, part: Part):
        self.file, self.part, self.place = path.open("rb", buffering=2**16), part, 0
        self.size = len(part.prefix) + part.stop - part.start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = max(0, origin + offset)
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, count: int) -> bytes:
        count = max(0, min(count, self.size - self.place))
        first = self.part.prefix[self.place : self.place + count]
        if len(first) < count:
            self.file.seek(self.part.start + self.place + len(first) - len(self.part.prefix))
            first += self.file.read(count - len(first))
        self.place += len(first)
        return first

    def readinto(self, buffer: object) -> int:
        got = self.read(len(buffer))
        buffer[: len(got)] = got
        return len(got)


class _Av:
    """What libsndfile does not know, by ffmpeg's libraries inside the package ``av``."""

    is_mpeg, num_samples = False, UNKNOWN_LENGTH

    def __init__(self, path: Path, form: str):
        self.container = av.open(str(path), format=form, metadata_errors="replace")
        streams = self.container.streams.audio
        if not streams:
            raise ValueError("there is no audio in it")
        self.stream = streams[0]
        self.frames = self.container.decode(self.stream)
        self.kept = self._next()
        if self.kept is None:
            raise ValueError("nothing in it can be decoded")
        self.channels = self.kept.shape[1]

    def _next(self) -> np.ndarray | None:
        for frame in self.frames:
            if hasattr(self, "rate") and frame.sample_rate != self.rate:
                raise ValueError(f"the rate changes to {frame.sample_rate} Hz")
            self.rate, channels = frame.sample_rate, len(frame.layout.channels)
            samples = frame.to_ndarray()
            samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
            if samples.dtype.kind in "iu":
                bits = 8 * samples.dtype.itemsize
                middle = 2 ** (bits - 1) if samples.dtype.kind == "u" else 0
                samples = (samples.astype(np.float32) - middle) / 2 ** (bits - 1)
            return np.ascontiguousarray(samples, np.float32)
        return None

    def read(self, count: int) -> np.ndarray:
        got, have = [], 0
        while self.kept is not None and have < count:
            got.append(self.kept[: count - have])
            have += len(got[-1])
            self.kept = self.kept[len(got[-1]) :]
            if not len(self.kept):
                self.kept = self._next()
                if self.kept is not None and self.kept.shape[1] != self.channels:
                    raise ValueError("the number of channels changes")
        return np.concatenate(got) if got else np.empty((0, self.channels), np.float32)


_INSTALL = "This kind of file needs ffmpeg's libraries, which `pip install 'cald-speech[formats]'` brings"
_SPH2PIPE = "`sph2pipe -f wav old.sph new.wav`, with https://github.com/burrmill/sph2pipe"
_DAMAGE = (soundfile.LibsndfileError, ValueError, IndexError, OSError, *((av.FFmpegError,) if av else ()))


def _open(path: Path, part: Part | None) -> "_Sndfile | _Av":
    try:
        if part is not None:
            return _Sndfile(_View(path, part))
        if path.suffix.lower() in _BY_NAME:
            return _Sndfile(os.fsencode(path))
        # Without the name: libsndfile takes whatever is called .raw or .snd for samples without a header.
        return _Sndfile(path.open("rb"))
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
        return _by_av(path, _reason(error))


def _by_av(path: Path, reason: str) -> _Av:
    form = _form_for_av(path)
    if form is None or av is None:
        way_out = _INSTALL if form else "Convert it to WAV or FLAC, or copy it again"
        if is_pointer(path):
            reason, way_out = "it is Git LFS's pointer to one", "Fetch it with `git lfs pull`"
        if _is_shortened(path):
            reason, way_out = "NIST SPHERE with shorten compression", f"Unpack it: {_SPH2PIPE}"
        if path.suffix.lower() in WITHOUT_HEADER:
            way_out = (
                f"Samples without a header: `sox -t raw -r 16000 -e signed -b 16 -c 1 {path.name} new.wav` says what"
            )
        raise UserError(f"{path}: expected an audio file, but it cannot be read ({reason}). {way_out}")
    try:
        return _Av(path, form)
    except _DAMAGE as error:
        raise UserError(
            f"{path}: expected an audio file, but it cannot be read ({reason}; {_reason(error)}). Convert it to WAV or "
            "FLAC, or copy it again"
        ) from error


def _is_shortened(path: Path) -> bool:
    """What libsndfile calls an unimplemented format: NIST SPHERE whose samples are packed by a program of the time."""
    with path.open("rb") as file:
        header = file.read(1024)
    return header.startswith(b"NIST_1A") and b"embedded-shorten" in header


def _form_for_av(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(16)
    if head[4:8] == b"ftyp":
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    return next((form for magic, form in BY_AV.items() if head.startswith(magic)), None)


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", None) or getattr(error, "strerror", None) or error).rstrip(".")
