"""Which files of a folder are audio: by their endings, and where those say nothing by their first bytes."""

from pathlib import Path

import soundfile

from cald_speech.audio_files.containers import MAGIC
from cald_speech.audio_files.reader import BY_AV, WITHOUT_HEADER

# What libsndfile and, with the extra `formats`, ffmpeg read; in small letters.
_SOUND = "opus oga aif aifc aiffc wave snd sph sf iff 8svx mp1 mp2 mpga m4a m4b 3gp aac mka wma amr ac3 eac3 ape wv tta"
_FILM = "mp4 m4v mov webm mkv asf flv avi"
_LIBSNDFILE = {name.lower() for name in soundfile.available_formats()} - {"raw"}
ENDINGS = frozenset(f".{name}" for name in {*_LIBSNDFILE, *_SOUND.split(), *_FILM.split(), "gsm", "vox"})
_COMPANION = b"\0\5\x16\7"


def is_companion(path: Path) -> bool:
    """Whether this is what macOS writes beside a file on other systems' drives, ``._talk.wav`` beside ``talk.wav``."""
    return path.name.startswith("._") and _head(path).startswith(_COMPANION)


def is_ending(suffix: str) -> bool:
    """Whether this is how the name of an audio file ends, in small letters or capitals."""
    return suffix.lower() in ENDINGS or suffix.lower() in WITHOUT_HEADER


def is_audio(path: Path) -> bool:
    """Whether a file is to be read as audio; one without a header (.raw) is, so that it is not left out in silence."""
    return is_ending(path.suffix) or _sounds(_head(path))


def _sounds(head: bytes) -> bool:
    if head[:4] in (b"RIFF", b"RIFX", b"FORM"):
        return head[8:12] in (b"WAVE", b"AVI ", b"AIFF", b"AIFC", b"8SVX", b"16SV")
    long_ones = tuple(magic for magic in (*MAGIC, *BY_AV) if len(magic) >= 4)
    return head.startswith((*long_ones, b"ID3")) or head[4:8] == b"ftyp"


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():  # to open a pipe waits for whoever writes to it
            return b""
        with path.open("rb") as file:
            return file.read(32)
    except (OSError, ValueError):
        return b""
