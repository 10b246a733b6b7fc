"""What every reader gives: one :class:`Record` for each utterance, made of a row by the names of its columns."""

import io
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import soundfile

from cald_speech.data.audio import audio_info
from cald_speech.errors import UserError, some_of
from cald_speech.files import from_home

# What other tools call each of our keys, the likeliest first.
NAMES: Mapping[str, tuple[str, ...]] = {
    "audio": ("audio", "audio_filepath", "audio_path", "wav", "path", "file_name", "filename", "file"),
    "text": ("text", "transcript", "transcription", "sentence", "wrd", "words", "label"),
    "id": ("id", "ID", "utt_id", "utterance_id", "key"),
    "duration_s": ("duration_s", "duration", "length", "seconds"),
    "start_s": ("start_s", "start", "offset"),
    "stop_s": ("stop_s", "stop", "end_s", "end"),
    "speaker": ("speaker", "speaker_id", "spk_id", "spk", "client_id"),
}
_TAKEN = {"wav", "labels"}  # what the items of a data set have beside a manifest's keys
_PLACEHOLDER = re.compile(r"\{data_root\}|\{data_folder\}|\$data_root|\$data_folder")


@dataclass
class Record:
    """One utterance as a corpus has it.

    ``audio`` is a path, or the bytes of a file whose name ends in ``suffix``, or what makes them. With ``start_s`` it
    is a segment; ``duration_s`` is None where it must be looked up. ``place`` is the file and line that errors name.
    """

    place: str
    id: str
    audio: Path | bytes | Callable[[], bytes]
    text: str
    start_s: float | None = None
    duration_s: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""


@dataclass(frozen=True)
class Format:
    """One format of corpora: whether a ``source`` (a path, or an address) is in it, its records, and its files.

    ``embeds`` says that the audio is inside of the files, and must be written beside the manifest.
    """

    name: str
    matches: Callable[[str], bool]
    read: Callable[[str, "Columns"], Iterator[Record]]
    files: Callable[[str], Sequence[Path]] = lambda source: [Path(source)]
    embeds: bool = False


class Columns:
    """Which column holds what. A column that is not named is found by what tools commonly call it (`NAMES`).

    Arguments
    ---------
    given : our key with the column's name; of "text", a list of columns too, whose words are then joined by spaces, and
        of none where texts are not wanted. A key that is not in `NAMES` is kept in the manifest under that name. Names
        that are numbers are places, from 1 on, in a table without a line of names.

    Example
    -------
    >>> columns = Columns({"text": ["scenario", "action"], "accent": "accents"})
    >>> row = {"path": "a.wav", "scenario": "alarm", "action": "set", "accents": "none"}
    >>> record = columns.record(row, "a.csv:2", Path("/data"))
    >>> record.audio.as_posix(), record.text, record.more
    ('/data/a.wav', 'alarm set', {'accent': 'none'})
    """

    def __init__(self, given: Mapping[str, Any] | None = None):
        given = given or {}
        if not isinstance(given, Mapping):
            raise UserError(f"columns: expected keys and values, such as {{text: sentence}}, got {given!r}")
        for key, column in given.items():
            column = _as_names(column)
            is_list = key == "text" and isinstance(column, Sequence) and all(isinstance(c, str) for c in column)
            if not isinstance(key, str) or key in _TAKEN or not (isinstance(column, str) or is_list):
                raise UserError(f"columns: expected a key such as text and the name of a column, got {key}: {column!r}")
        self.given = {key: _as_names(column) for key, column in given.items()}
        self._found: dict[tuple[str, ...], dict[str, Any]] = {}

    @property
    def wants_text(self) -> bool:
        return self.given.get("text") != []

    @property
    def named(self) -> list[str]:
        """The columns that were named."""
        return [name for column in self.given.values() for name in ([column] if isinstance(column, str) else column)]

    def find(self, there: Sequence[str], place: str) -> dict[str, Any]:
        """Our keys with the column of each, among those that are ``there``. Raises UserError where one is missing."""
        known = self._found.get(tuple(there))
        if known is not None:
            return known
        found: dict[str, Any] = {}
        for key, column in self.given.items():
            missing = [c for c in ([column] if isinstance(column, str) else column) if c not in there]
            if missing:
                raise UserError(
                    f"{place}: expected the column {missing[0]!r}, which `columns` names for {key}, but there are "
                    f"{_shown(there)}. Correct `columns`."
                )
            found[key] = column
        for key, names in NAMES.items():
            name = next((name for name in names if name in there and name not in found.values()), None)
            if key not in found and name is not None:
                found[key] = name
        for key in ("audio", "text"):
            if key not in found:
                raise UserError(
                    f"{place}: expected a column with the {key} ({', '.join(NAMES[key])}), but there are "
                    f"{_shown(there)}. Say which it is: columns: {{{key}: <its name>}} in the experiment, or --columns"
                )
        self._found[tuple(there)] = found
        return found

    def record(self, row: Mapping[str, Any], place: str, folder: Path, *, name: str | None = None) -> Record:
        """The record of a row. Its path is relative to ``folder``; ``name`` is the id where the row has none.

        Raises: UserError, naming the place, for a value that cannot be.
        """
        found = self.find(tuple(row), place)
        values = {key: row[column] for key, column in found.items() if isinstance(column, str)}
        text = found["text"]
        words = [row[column] for column in ([text] if isinstance(text, str) else text)]
        start_s, duration_s = _seconds(values, "start_s", place), _seconds(values, "duration_s", place)
        stop_s = _seconds(values, "stop_s", place)
        audio, suffix, span = _audio(values["audio"], place, folder)
        if span is not None:
            start_s, stop_s = span
        elif stop_s is not None and {"ID", "wav"} <= row.keys():  # SpeechBrain counts samples
            start_s, stop_s = _in_seconds(audio, start_s or 0, stop_s, place)
        if stop_s is not None:
            start_s = start_s or 0.0
            length_s = stop_s - start_s
            if length_s <= 0 or (duration_s is not None and abs(length_s - duration_s) > 0.1):
                beside = "" if duration_s is None else f" and a duration of {duration_s:g} s"
                raise UserError(
                    f"{place}: expected start < stop, got {start_s:g} and {stop_s:g} s{beside}. Mend the line."
                )
            duration_s = length_s
        if duration_s == 0:
            raise UserError(f"{place}: expected a duration above 0 s, got 0. Mend the line, or leave it out.")
        given = values.get("id", name)
        if given is None or given == "":
            given = _id_of(audio, folder, start_s, place)
        kept = {key: v for key, v in values.items() if (key == "speaker" or key not in NAMES) and v is not None}
        return Record(
            place,
            _word(given, "id", place),
            audio,
            " ".join(_word(word, "text", place) for word in words),
            start_s,
            duration_s,
            {key: _word(value, key, place) for key, value in kept.items()},
            suffix,
        )


def _as_names(column: Any) -> Any:
    """A yaml's numbers as the text that a command would have."""
    if isinstance(column, Sequence) and not isinstance(column, str):
        return [_as_names(one) for one in column]
    return str(column) if isinstance(column, int) and not isinstance(column, bool) else column


def path_of(value: str, place: str, folder: Path) -> Path:
    """The path that a corpus gives, relative to the ``folder`` of the file that gives it.

    Where no file has just this name, it is that of one called so by another system: letters composed or decomposed
    (macOS), backslashes (Windows), the name alone of what lies in ``clips`` (Common Voice).
    """
    value = _PLACEHOLDER.sub(lambda match: str(folder), value)
    if value.startswith("file://"):
        value = unquote(value.removeprefix("file://").removeprefix("localhost"))
    value = from_home(value)
    too_long = max(map(len, value.encode("utf-8", "replace").split(b"/"))) > 255
    if not value or "\0" in value or too_long or not is_unicode(value):
        raise UserError(f"{place}: expected the path of an audio file, got {value!r:.80}. Mend the line.")
    if "://" in value:
        raise UserError(f"{place}: expected the path of an audio file, got the address {value}. Download it first.")
    path = Path(os.path.normpath(folder / value))
    if os.path.isfile(path):
        return path
    names = [value, unicodedata.normalize("NFC", value), unicodedata.normalize("NFD", value), value.replace("\\", "/")]
    names += [f"clips/{value}"] if "/" not in value else []
    # The first is not the same: behind a link to a folder, .. is above the folder that it leads to.
    return next((folder / name for name in names if os.path.isfile(folder / name)), path)


def seconds(value: Any, what: str, place: str) -> float:
    """A number of seconds from 0 on, of a number or of text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(
            f"{place}: expected seconds from 0 on as {what}, got {value!r:.80}. Mend the line, or leave it out."
        )
    return number


def _seconds(values: Mapping[str, Any], key: str, place: str) -> float | None:
    value = values.get(key)
    return None if value is None or value == "" else seconds(value, key.removesuffix("_s"), place)


def _audio(value: Any, place: str, folder: Path) -> tuple[Path | bytes, str, tuple[float, float] | None]:
    """Path or bytes, the ending of the bytes' name, and the span in seconds where it is part of a file."""
    if isinstance(value, str):
        return path_of(value, place, folder), "", None
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return value["bytes"], Path(str(value.get("path") or "")).suffix, None
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return path_of(value["path"], place, folder), "", None
    if isinstance(value, Mapping) and isinstance(value.get("array"), list):  # decoded, as `datasets` gives it
        return _encoded(value, place), ".wav", None
    if isinstance(value, Mapping) and isinstance(value.get("file"), str):  # SpeechBrain's, with samples
        path = path_of(value["file"], place, folder)
        if "start" not in value and "stop" not in value:
            return path, "", None
        start, stop = (seconds(value.get(key, 0), key, place) for key in ("start", "stop"))
        return path, "", _in_seconds(path, start, stop, place)
    raise UserError(f"{place}: expected the path of an audio file, got {value!r:.80}. Mend the line.")


def _encoded(decoded: Mapping[str, Any], place: str) -> bytes:
    """The samples (N,) or (channels, N) of a row as a WAV file."""
    content, rate = io.BytesIO(), decoded.get("sampling_rate")
    try:
        samples = np.array(decoded["array"], np.float32)
        soundfile.write(content, samples.T, rate, format="WAV", subtype="FLOAT")
    except (TypeError, ValueError, soundfile.LibsndfileError) as error:
        raise UserError(
            f"{place}: expected numbers as array and their sampling_rate, got {rate!r} ({error!s:.80}). Mend the line."
        ) from error
    return content.getvalue()


def _in_seconds(path: Path | bytes, start: float, stop: float, place: str) -> tuple[float, float]:
    if isinstance(path, bytes):
        raise UserError(f"{place}: expected a whole file, got a part of one that is inside of another. Cut it out.")
    try:
        rate = audio_info(path)[1]
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return start / rate, stop / rate


def _word(value: Any, key: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not is_unicode(str(value)):
        raise UserError(f"{place}: expected text as {key}, got {value!r:.80}. Mend the line, or leave it out.")
    return str(value)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: half of a surrogate pair, which JSON can say, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _id_of(audio: Path | bytes, folder: Path, start_s: float | None, place: str) -> str:
    if isinstance(audio, bytes):
        raise UserError(f"{place}: expected an id, since the audio has no name. Add a column with one.")
    inside = audio.relative_to(folder) if audio.is_relative_to(folder) else audio
    return inside.with_suffix("").as_posix() + ("" if not start_s else f"@{start_s:.3f}")


def _shown(names: Sequence[str]) -> str:
    return some_of([f"{name!r:.40}" for name in names], most=10, separator=", ") or "none"
