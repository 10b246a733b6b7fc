"""Audio files of whatever kind, decoded to their real end at their own rate, and resampling.

What a file says of its length is a hint. ``containers`` holds it against the bytes that are there, ``mpeg`` and ``ogg``
go through the file, and ``reader`` decodes what they found. ``data/audio.py`` makes training items of it and refuses a
file with a fault; ``longform/source.py`` gives what can be read of it, part by part.
"""

from cald_speech.audio_files.reader import RATES, UNKNOWN_LENGTH, AudioFile, Fault

__all__ = ["RATES", "UNKNOWN_LENGTH", "AudioFile", "Fault"]
