"""lhotse's cuts, read as the JSON that they are: lhotse itself is not needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cald_speech.data.readers.records import Record, path_of, seconds
from cald_speech.errors import UserError

_KINDS = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut")


def is_cut(row: Mapping[str, Any]) -> bool:
    return row.get("type") in _KINDS or ("supervisions" in row and "recording" in row)


def record(row: Mapping[str, Any], place: str, folder: Path, *, inside: tuple[bytes, str] | None = None) -> Record:
    """The utterance that a cut is: its part of its recording, and the texts of its supervisions one after the other.

    ``inside`` is the audio of a cut in a shard, with the ending of its name. Raises: UserError for mixed cuts, padding,
    changes that lhotse would make while it reads, and recordings that are no files.
    """
    if row.get("type", "MonoCut") != "MonoCut":
        raise UserError(f"{place}: expected a MonoCut, got a {row['type']}: mixed audio. Write it to files first.")
    start_s = seconds(row.get("start", 0), "start", place)
    duration_s = seconds(row.get("duration"), "duration", place) or None
    supervisions = row.get("supervisions") or []
    if not isinstance(supervisions, list) or not all(isinstance(part, dict) for part in supervisions):
        raise UserError(f"{place}: expected a list of supervisions, got {supervisions!r:.80}. Mend the line.")
    said = sorted(supervisions, key=lambda part: seconds(part.get("start", 0), "start", place))
    words = [part.get("text") for part in said if part.get("text") is not None]
    speakers = {part["speaker"] for part in said if isinstance(part.get("speaker"), str)}
    name = row.get("id")
    if not isinstance(name, str) or not words or not all(isinstance(word, str) for word in words):
        raise UserError(f"{place}: expected a cut with an id and a supervision with its text. Mend it.")
    more = {"speaker": speakers.pop()} if len(speakers) == 1 else {}
    if inside is not None:
        audio, suffix = inside
        return Record(place, name, audio, " ".join(words), start_s, duration_s, more, suffix)
    return Record(place, name, _file(row, place, folder), " ".join(words), start_s, duration_s, more)


def _file(row: Mapping[str, Any], place: str, folder: Path) -> Path:
    recording = row.get("recording")
    sources = recording.get("sources") if isinstance(recording, dict) else None
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources) or len(sources) != 1:
        raise UserError(f"{place}: expected a cut with a recording of one file. Write the cuts with their recordings.")
    source = sources[0]
    if recording.get("transforms"):
        raise UserError(f"{place}: expected a recording as it is, got one that lhotse changes: write it to files.")
    if source.get("type") != "file" or not isinstance(source.get("source"), str):
        raise UserError(
            f"{place}: expected a recording in a file, got one of type {source.get('type')!r}: write it to files first."
        )
    channels = source.get("channels")
    if channels not in (None, [0], [row.get("channel")]):
        raise UserError(
            f"{place}: expected a recording with one channel, got the channels {channels!r}, of which the cut takes "
            "one; here channels are averaged. Write that channel to a file of its own."
        )
    return path_of(source["source"], place, folder)
