"""Exact inference over audio of any length in bounded memory (floor F4).

:func:`transcribe` gives the words of a recording, :func:`align_text` the times of words that one knows, :func:`stream`
the logits of audio that is still arriving. In the order of the work: ``source`` reads audio, ``front_end`` makes frames
of it, ``layers`` runs each layer over all frames, ``encoder`` is the whole, ``live`` the same for audio that arrives;
``ctc`` decodes, ``alignment`` aligns, ``words`` gives times, ``recogniser`` puts all together, ``formats`` writes it.
"""

from cald_speech.longform.encoder import encode_long, predicted_peak_bytes, stream_logits
from cald_speech.longform.live import latency_s, stream
from cald_speech.longform.recogniser import Recogniser, align_text, transcribe
from cald_speech.longform.source import AudioSource
from cald_speech.longform.words import Word

__all__ = [
    "AudioSource",
    "Recogniser",
    "Word",
    "align_text",
    "encode_long",
    "latency_s",
    "predicted_peak_bytes",
    "stream",
    "stream_logits",
    "transcribe",
]
