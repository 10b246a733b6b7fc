"""lhotse's cuts: a part of one recording in a file is read as the JSON that it is, without lhotse.

What takes more is left to lhotse itself (the extra ``lhotse``): mixed and padded cuts, changes that are made while a
recording is read, one channel of several, recordings that are addresses or commands.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import soundfile

from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.data.readers.records import Record, path_of, seconds
from cald_speech.errors import UserError

_KINDS = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut")


def is_cut(row: Mapping[str, Any]) -> bool:
    return row.get("type") in _KINDS or ("supervisions" in row and "recording" in row)


def record(row: Mapping[str, Any], place: str, folder: Path, *, inside: tuple[bytes, str] | None = None) -> Record:
    """The utterance that a cut is: its part of its recording, and the texts of its supervisions one after the other.

    ``inside`` is the audio of a cut in a shard, with the ending of its name. Raises: UserError for what is malformed,
    and where lhotse is needed and is not installed.
    """
    if row.get("type", "MonoCut") != "MonoCut":
        if inside is not None:
            raise UserError(f"{place}: expected a MonoCut, got a {row['type']}: mixed audio. Write it to files first.")
        return _by_lhotse(row, place, folder, f"a {row['type']}, which is mixed audio")
    start_s = seconds(row.get("start", 0), "start", place)
    duration_s = seconds(row.get("duration"), "duration", place) or None
    supervisions = row.get("supervisions") or []
    if not isinstance(supervisions, list) or not all(isinstance(part, dict) for part in supervisions):
        raise UserError(f"{place}: expected a list of supervisions, got {supervisions!r:.80}. Mend the line.")
    said = sorted(supervisions, key=lambda part: seconds(part.get("start", 0), "start", place))
    name, words, more = _said(row.get("id"), said, place)
    if inside is not None:
        audio, suffix = inside
        return Record(place, name, audio, words, start_s, duration_s, more, suffix)
    why = _needs_lhotse(row, place)
    if why:
        return _by_lhotse(row, place, folder, why)
    audio = path_of(row["recording"]["sources"][0]["source"], place, folder)
    return Record(place, name, audio, words, start_s, duration_s, more)


def _said(name: Any, supervisions: list[Mapping[str, Any]], place: str) -> tuple[str, str, dict[str, str]]:
    """Id, text, and the speaker where it is one."""
    words = [part.get("text") for part in supervisions if part.get("text") is not None]
    speakers = {part["speaker"] for part in supervisions if isinstance(part.get("speaker"), str)}
    if not isinstance(name, str) or not words or not all(isinstance(word, str) for word in words):
        raise UserError(f"{place}: expected a cut with an id and a supervision with its text. Mend it.")
    return name, " ".join(words), {"speaker": speakers.pop()} if len(speakers) == 1 else {}


def _needs_lhotse(row: Mapping[str, Any], place: str) -> str:
    """Why a cut is more than a part of one file of one channel; "" where it is that."""
    recording = row.get("recording")
    sources = recording.get("sources") if isinstance(recording, dict) else None
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise UserError(f"{place}: expected a cut with its recording. Write the cuts with their recordings.")
    source = sources[0]
    if len(sources) > 1:
        return f"a recording of {len(sources)} files"
    if recording.get("transforms"):
        return "a recording that is changed while it is read"
    if source.get("type") != "file" or not isinstance(source.get("source"), str):
        return f"a recording of type {source.get('type')!r}"
    channels = source.get("channels")
    if channels not in (None, [0], [row.get("channel")]):
        return f"one of the channels {channels!r}"  # here they would be averaged
    return ""


def _by_lhotse(row: Mapping[str, Any], place: str, folder: Path, why: str) -> Record:
    """The same for any cut, its audio made by lhotse when it is asked for."""
    try:
        from lhotse.serialization import deserialize_item
    except ImportError as error:
        raise UserError(
            f"{place}: expected a part of one recording in a file, got {why}, for which lhotse is needed: pip install "
            "'cald-speech[lhotse]', or write it to files first."
        ) from error
    try:
        cut = deserialize_item(_with_paths(dict(row), folder))
        said = sorted(cut.supervisions, key=lambda part: part.start)
        duration_s = float(cut.duration)
    except Exception as error:  # lhotse raises errors of many kinds for what is malformed
        raise UserError(
            f"{place}: expected a cut of lhotse's, but it cannot be made ({error!r:.200}). Mend it."
        ) from error
    name, words, more = _said(cut.id, [{"text": part.text, "speaker": part.speaker} for part in said], place)
    return Record(place, name, _audio_of(cut, place), words, None, duration_s, more, ".flac")


def _audio_of(cut: Any, place: str) -> Callable[[], bytes]:
    def load() -> bytes:
        try:
            samples = cut.resample(SAMPLE_RATE).load_audio()
        except Exception as error:  # of lhotse, of the file, of a command that gives the audio
            raise UserError(f"{place}: lhotse cannot read the audio of this cut ({error!r:.200}). Mend it.") from error
        content = io.BytesIO()
        soundfile.write(content, samples.mean(axis=0).clip(-1, 1), SAMPLE_RATE, format="FLAC")
        return content.getvalue()

    return load


def _with_paths(value: Any, folder: Path) -> Any:
    """The cut with its files' paths relative to the folder of the file that names them, as everywhere here."""
    if isinstance(value, dict):
        changed = {key: _with_paths(part, folder) for key, part in value.items()}
        if changed.get("type") == "file" and isinstance(changed.get("source"), str):
            changed["source"] = str(folder / changed["source"])
        return changed
    return [_with_paths(part, folder) for part in value] if isinstance(value, list) else value
