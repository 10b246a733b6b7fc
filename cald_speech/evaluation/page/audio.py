"""The sound of the worst utterances, small enough to travel inside a page.

MP3, since every browser plays it; at 16 kHz some 4 kB a second. What does not fit is counted, and the page says so.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
from torch import Tensor

from cald_speech.data.audio import SAMPLE_RATE, read_entry
from cald_speech.data.manifests import manifest_hash, read_manifest
from cald_speech.errors import UserError

SMALL = 0.8  # libsndfile's scale from 0, the best, to 1, the smallest: 34 kbit/s of speech
AT_LEAST_PER_S = 2_000  # bytes: what surely does not fit is not read
AT_ONCE = 2**16


def embed_audio(sets: Sequence[dict[str, Any]], budget: int) -> dict[str, Any]:
    """Give utterances of the page's ``sets`` their speaker and, the worst first, the place of their sound.

    Returns ``audio``, base64 by place, of ``budget`` bytes at most, and ``audio_facts``.
    """
    facts: dict[str, Any] = {"embedded": 0, "left_out": 0, "unreadable": 0, "why": None, "format": "audio/mpeg"}
    audio: list[str] = []
    known: dict[tuple[Any, ...], int | None] = {}
    waiting = []
    for shown in sets:
        entries, why = _entries(shown)
        facts["why"] = facts["why"] or why
        for utterance in shown["utterances"]:
            entry = entries.get(utterance["id"])
            if entry is None:
                facts["unreadable"] += 1
                continue
            if "speaker" in entry:
                utterance["speaker"] = str(entry["speaker"])
            waiting.append((-max(heard["errors"] for heard in utterance["heard"]), len(waiting), utterance, entry))
    left = budget
    for *_, utterance, entry in sorted(waiting, key=lambda item: item[:2]):
        key = (entry["audio"], entry.get("start_s"), entry["duration_s"])
        if key not in known:
            if entry["duration_s"] * AT_LEAST_PER_S > left:
                facts["left_out"] += 1
                continue
            try:
                encoded = _encoded(read_entry(entry))
            except UserError as error:
                facts["unreadable"] += 1
                facts["why"] = facts["why"] or str(error)
                continue
            if len(encoded) > left:
                facts["left_out"] += 1
                continue
            left -= len(encoded)
            known[key] = len(audio)
            audio.append(encoded)
        utterance["audio"] = known[key]
        facts["embedded"] += 1
    return {"audio": audio, "audio_facts": facts}


def _entries(shown: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The manifest's entries, or none, and why."""
    why = None
    for path in map(Path, shown["manifests"]):
        try:
            if manifest_hash(path)[:12] == shown["manifest_hash"]:
                return read_manifest(path), None
            why = f"{path} has changed since the evaluation"
        except UserError as error:
            why = str(error)
    return {}, why


def _encoded(samples: Tensor) -> str:
    stream = io.BytesIO()
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": SMALL}
    with soundfile.SoundFile(stream, "w", SAMPLE_RATE, 1, **options) as file:
        for part in samples.clamp(-1, 1).split(AT_ONCE):
            file.write(part.numpy())
    return base64.b64encode(stream.getvalue()).decode()
