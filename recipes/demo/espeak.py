"""espeak-ng through ctypes: text to speech.

Run as a script this file speaks JSON lines {"text", "voice", "rate_wpm", "pitch", "pitch_range"} from its standard
input and writes, for each, the number of samples (int32) and the samples (int16, 22,050 Hz) to its standard output. It
runs in a process of its own because the library carries state from one utterance to the next, which no call resets:
only a new process says the same bytes again. So it imports nothing of this package, and starts in 0.1 s.

espeak-ng is GPL-3 and comes with the `espeakng-loader` wheel, which only the `demo` extra installs.
"""

import ctypes
import json
import sys

import espeakng_loader

ESPEAK_RATE = 22_050
_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback before espeak_Synth returns
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_CHARACTERS, _UTF8 = 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The library, opened once in this process.

    Raises: RuntimeError, where it does not start or knows no such voice.

    Example
    -------
    >>> samples = Espeak().say("hello", voice="gmw/en-US+f3", rate_wpm=160, pitch=50, pitch_range=50)
    >>> len(samples) % 2
    0
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        size, flags, pointer = ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p
        self._library.espeak_Synth.argtypes = (
            [ctypes.c_char_p, size, flags, ctypes.c_int, flags, flags, pointer, pointer]
        )  # fmt: skip
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if rate != ESPEAK_RATE:
            raise RuntimeError(f"espeak-ng: expected to start at {ESPEAK_RATE} Hz, but it answered {rate}")
        self._chunks: list[bytes] = []
        # the library keeps the bare pointer: this reference keeps the callback alive
        self._callback = _CALLBACK(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)
        # some voices (the Klatt ones) draw their breath noise from the C library's generator
        ctypes.CDLL(None).srand(1)

    def _receive(self, samples, num_samples: int, _events) -> int:
        if samples and num_samples > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * num_samples))
        return 0

    def say(self, text: str, *, voice: str, rate_wpm: int, pitch: int, pitch_range: int) -> bytes:
        """Speak `text` (int16 bytes at 22,050 Hz). `voice` is a language file, "+", a variant; pitches go 0 to 100."""
        self._chunks.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng: there is no voice {voice!r}")
        for parameter, value in ((_RATE, rate_wpm), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        data = text.encode()
        if self._library.espeak_Synth(data, len(data) + 1, 0, _CHARACTERS, 0, _UTF8, None, None) != 0:
            raise RuntimeError(f"espeak-ng: could not speak {text!r}")
        return b"".join(self._chunks)


def _serve() -> None:
    espeak = Espeak()
    for line in sys.stdin:
        samples = espeak.say(**json.loads(line))
        sys.stdout.buffer.write((len(samples) // 2).to_bytes(4, "little") + samples)


if __name__ == "__main__":
    _serve()
