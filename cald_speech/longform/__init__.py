"""Exact inference over audio of any length in bounded memory (floor F4)."""

from cald_speech.longform.encoder import encode_long, stream_logits
from cald_speech.longform.live import latency_s, stream
from cald_speech.longform.memory import predicted_peak_bytes
from cald_speech.longform.recogniser import Recogniser, load_processor
from cald_speech.longform.source import AudioSource
from cald_speech.longform.transcribe import align_text, transcribe
from cald_speech.longform.words import Word

__all__ = [
    "AudioSource",
    "Recogniser",
    "Word",
    "align_text",
    "encode_long",
    "latency_s",
    "load_processor",
    "predicted_peak_bytes",
    "stream",
    "stream_logits",
    "transcribe",
]
