"""Kaldi's data folders: wav.scp and text, with or without segments, utt2spk and utt2dur."""

import logging
from collections.abc import Iterator
from pathlib import Path

from cald_speech.data.encodings import read_text
from cald_speech.data.readers.records import Columns, Format, Record, path_of, seconds
from cald_speech.errors import UserError

logger = logging.getLogger(__name__)
_FILES = ("wav.scp", "text", "segments", "utt2spk", "utt2dur")


def read(source: str, columns: Columns) -> Iterator[Record]:
    """An utterance for each line of segments, or of wav.scp where there are none.

    Raises: UserError for pipes, parts of archives, and utterances that are in one file and not in another.
    """
    if columns.given and columns.wants_text:
        raise UserError(f"{source}: Kaldi's folders have no columns to name, got {columns.given}.")
    folder = Path(source).absolute()
    recordings = {
        name: (place, _audio(rest, place, folder)) for name, (place, rest) in _lines(folder / "wav.scp").items()
    }
    texts = _lines(folder / "text")
    parts, speakers, durations = (
        _lines(folder / name) if (folder / name).is_file() else {} for name in ("segments", "utt2spk", "utt2dur")
    )
    utterances = parts or recordings
    unused = recordings.keys() - {rest.split()[0] for _, rest in parts.values() if rest} if parts else ()
    if unused:
        logger.warning("%s: no segment names %d of %d recordings", source, len(unused), len(recordings))
    for name, (place, _) in texts.items():
        if name not in utterances:
            raise UserError(
                f"{place}: expected {name} in {'segments' if parts else 'wav.scp'} too, but it is not there."
            )
    for name, (place, rest) in utterances.items():
        if name not in texts:
            raise UserError(f"{place}: expected {name} in {folder / 'text'} too, but it is not there.")
        start_s = duration_s = None
        audio = rest
        if parts:
            start_s, duration_s, audio = _segment(place, rest, recordings)
        elif name in durations:
            duration_s = seconds(durations[name][1], "the duration", durations[name][0])
        more = {"speaker": speakers[name][1]} if name in speakers else {}
        yield Record(place, name, audio, texts[name][1], start_s, duration_s, more)


def _segment(place: str, rest: str, recordings: dict[str, tuple[str, Path]]) -> tuple[float, float | None, Path]:
    fields = rest.split()
    if len(fields) < 3 or fields[0] not in recordings:
        known = "a recording of wav.scp" if len(fields) > 2 else "<utterance> <recording> <start> <end>"
        raise UserError(f"{place}: expected {known}, got {rest!r:.80}. Mend the line.")
    start_s = seconds(fields[1], "the start", place)
    if fields[2] == "-1":  # to the end of the recording
        return start_s, None, recordings[fields[0]][1]
    duration_s = seconds(fields[2], "the end", place) - start_s
    if duration_s <= 0:
        raise UserError(f"{place}: expected start < end, got {fields[1]} and {fields[2]}. Mend the line.")
    return start_s, duration_s, recordings[fields[0]][1]


def _lines(path: Path) -> dict[str, tuple[str, str]]:
    """(place, the rest of the line) by the first word of each line."""
    found: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(read_text(path, f"Kaldi's {path.name}").split("\n"), start=1):
        words = line.split(maxsplit=1)
        if not words:
            continue
        place = f"{path}:{number}"
        if words[0] in found:
            raise UserError(
                f"{place}: expected each name once, but {words[0]} is in {found[words[0]][0]} too. Mend one."
            )
        found[words[0]] = place, words[1].strip() if len(words) > 1 else ""
    return found


def _audio(value: str, place: str, folder: Path) -> Path:
    if value.endswith("|"):
        raise UserError(
            f"{place}: expected the path of an audio file, got a pipe. A data folder is read, and no program run: "
            "write what the pipe gives into a file, and its path here. (NIST SPHERE is read as it is.)"
        )
    if ".ark:" in value or value.startswith("-"):
        raise UserError(f"{place}: expected the path of an audio file, got {value!r:.80}, a part of an archive.")
    return path_of(value, place, folder)


FORMAT = Format(
    "a Kaldi data folder (wav.scp, text)",
    lambda source: Path(source, "wav.scp").is_file(),
    read,
    lambda source: [Path(source, name) for name in _FILES],
)
