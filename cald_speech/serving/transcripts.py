"""From a recording to the answer that was asked for, in OpenAI's five forms."""

import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cald_speech.errors import UserError
from cald_speech.longform import AudioSource, Recogniser, Word
from cald_speech.longform.formats import FORMATS, cue_groups
from cald_speech.serving.asked import Asked, Refused
from cald_speech.serving.work import Look


@dataclass(frozen=True)
class Transcript:
    """The words of a recording, without their characters; ``told`` is what was wrong with it."""

    words: Sequence[Word]
    duration_s: float
    told: tuple[str, ...]


def transcript(recogniser: Recogniser, path: Path, name: str, look: Look, **options: Any) -> Transcript:
    """Read the file in one exact pass; ``look`` is called after every block.

    Raises: Refused for what is no audio, nothing of which can be read, or for which there is no memory.
    """
    try:
        source = AudioSource.open(path)
        # One thread at a time does this: catch_warnings is the whole process's.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            found = recogniser.transcribe(source, progress=lambda fraction: look(), **options)
            words = [replace(word, characters=()) for word in found]
        fault = source.fault if not source.duration_s else None
        refusal = fault and _unreadable(f"{_shown(name)}: nothing of it can be read: {fault.message}")
    except UserError as error:
        refusal = _unreadable(str(error).replace(str(path), _shown(name)))
    except (MemoryError, torch.OutOfMemoryError):
        message = "file: expected a recording that the server has memory for, got a longer one: cut it"
        refusal = Refused(413, message, param="file")
    if refusal is not None:
        raise refusal  # here, where no error behind it holds the file open
    told = [str(warning.message).removeprefix("the audio: ") for warning in caught]
    return Transcript(words, source.duration_s, tuple([source.note] if source.note else []) + tuple(told))


def answer(found: Transcript, asked: Asked, language: str | None) -> tuple[str, dict | None]:
    """The answer as (text, None), or as ("", what becomes JSON)."""
    if asked.form in FORMATS and asked.form != "json":
        return "".join(FORMATS[asked.form].write(found.words)), None
    told = {"warnings": list(found.told)} if found.told else {}
    text = _text(found.words)
    if asked.form == "json":
        return "", {"text": text} | told
    verbose = {"task": "transcribe", "language": language or "unknown", "duration": found.duration_s, "text": text}
    if "segment" in asked.granularities:
        verbose["segments"] = segments(found.words)
    if "word" in asked.granularities:
        verbose["words"] = [word_times(word) for word in found.words]
    return "", verbose | told


def word_times(word: Word) -> dict[str, Any]:
    """A word as OpenAI's clients read it, and how sure the model is of it."""
    times = {"word": word.text, "start": round(word.start_s, 3), "end": round(word.end_s, 3)}
    return times | {"confidence": round(word.confidence, 4)}


def segments(words: Sequence[Word]) -> list[dict[str, Any]]:
    """What each subtitle shows, as OpenAI's segments. Fields that a CTC model has nothing for are 0 or empty."""
    found = []
    for number, own in enumerate(cue_groups(words)):
        text = _text(own)
        found.append(
            {
                "id": number,
                "seek": 0,
                "start": round(own[0].start_s, 3),
                "end": round(own[-1].end_s, 3),
                "text": text,
                "tokens": [],
                "temperature": 0.0,
                "avg_logprob": round(sum(math.log(max(w.confidence, 1e-9)) for w in own) / len(own), 4),
                "compression_ratio": round(len(text.encode()) / max(1, len(zlib.compress(text.encode()))), 4),
                "no_speech_prob": 0.0,
            }
        )
    return found


def _unreadable(message: str) -> Refused:
    return Refused(400, " ".join(message.split()), param="file", code="unreadable_audio")


def _text(words: Sequence[Word]) -> str:
    return "".join(word.text if word.joined or not at else f" {word.text}" for at, word in enumerate(words))


def _shown(name: str) -> str:
    """The name that a client gave, as far as it can be shown."""
    return "".join(c for c in Path(name).name[:80] if c.isprintable()) or "the file"
