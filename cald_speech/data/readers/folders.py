"""Folders of audio: with a .txt beside each file, in LibriSpeech's layout, or with a Hugging Face metadata file."""

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cald_speech.audio_files.names import ENDINGS
from cald_speech.data.encodings import read_text
from cald_speech.data.readers import hugging_face, json_files, tables
from cald_speech.data.readers.records import Columns, Format, Record
from cald_speech.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder, sorted, but hidden ones (macOS writes ``._talk.wav`` beside ``talk.wav``)."""
    return sorted(_walk(folder))


def _walk(folder: str | Path) -> Iterator[Path]:
    seen = set()
    for at, inner, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in seen:  # a link to a folder above
            inner.clear()
            continue
        seen.add(real)
        yield from (Path(at, name) for name in names if not name.startswith("."))


def audio_among(files: Iterable[Path]) -> list[Path]:
    return [path for path in files if path.suffix.lower() in ENDINGS]


# --- a .txt beside each file ------------------------------------------------------------------------------------------


def read_pairs(source: str, columns: Columns) -> Iterator[Record]:
    """``talk.wav`` and ``talk.txt``. With ``columns: {text: folder}`` the folder's name is the text: a label."""
    folder = Path(source).absolute()
    if columns.given not in ({}, {"text": "folder"}, {"text": []}):
        raise UserError(f"{source}: a folder of audio has no columns, but for {{text: folder}}; got {columns.given}.")
    files = files_in(folder)
    texts = {} if columns.given else {_key(path): path for path in files if path.suffix.lower() == ".txt"}
    for path in (audio := audio_among(files)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        said = texts.get(_key(path))
        if columns.given:
            yield Record(str(path), name, path, path.parent.name if columns.wants_text else "")
        elif said is not None:
            yield Record(str(path), name, path, " ".join(read_text(said, "a transcript").split()))
        else:
            raise UserError(
                f"{path}: expected its transcript in {path.stem}.txt beside it, but there is none. Write it, or give a "
                "table of the files that are to be used; where folders are labels, columns: {text: folder}"
            )
    lost = sorted(texts[key] for key in texts.keys() - set(map(_key, audio)))
    if lost:
        raise UserError(
            f"{lost[0]}: expected audio of that name beside it, but there is none ({len(lost)} such). Keep what is no "
            "transcript elsewhere, or give a table of the files that are to be used."
        )


def _key(path: Path) -> str:
    """What an audio file and its text have in common, whether letters are composed, and endings in capitals."""
    return unicodedata.normalize("NFC", str(path.with_suffix("")))


# --- LibriSpeech ------------------------------------------------------------------------------------------------------


def read_librispeech(source: str, columns: Columns) -> Iterator[Record]:
    """``3-7-0001.flac`` and its line in ``3-7.trans.txt`` in the same folder."""
    if columns.given and columns.wants_text:
        raise UserError(f"{source}: LibriSpeech's layout has no columns to name, got {columns.given}.")
    audio, texts = match_chapters(files_in(Path(source).absolute()))
    for path, (place, text) in texts.items():
        if path in audio and text:
            yield Record(place, path.stem, path, text, more={"speaker": path.stem.split("-")[0]})
    silent = [path for path in audio if not texts.get(path, ("", ""))[1]]
    lost = [(place, path) for path, (place, _) in texts.items() if path not in audio]
    if silent:
        raise UserError(f"{silent[0]}: expected a transcript in a .trans.txt beside it, but there is none.")
    if lost:
        raise UserError(f"{lost[0][0]}: expected audio beside it for {lost[0][1].stem}, but there is none.")


def match_chapters(files: Sequence[Path]) -> tuple[list[Path], Mapping[Path, tuple[str, str]]]:
    """The audio, and the place and text of each line of the transcripts by its audio's path, which may not be there.

    Raises: UserError, naming both places, for an utterance that is there twice.
    """
    audio = audio_among(files)
    where: dict[str, Path] = {}
    for path in audio:
        other = where.setdefault(path.stem, path)
        if other != path:
            raise UserError(f"expected each utterance once, but {path.stem} is {other} and {path}. Rename one of them.")
    texts: dict[Path, tuple[str, str]] = {}
    for table in files:
        if not table.name.endswith(".trans.txt"):
            continue
        for number, line in enumerate(read_text(table, "transcripts").split("\n"), start=1):
            name, _, text = line.strip().partition(" ")
            if not name:
                continue
            place, path = f"{table}:{number}", where.get(name, table.parent / f"{name}.flac")
            if path in texts:
                raise UserError(
                    f"{place}: expected each utterance once, but {name} is in {texts[path][0]} too. Mend one."
                )
            texts[path] = place, text.strip()
    return audio, texts


# --- Hugging Face's audiofolder ---------------------------------------------------------------------------------------


def read_audiofolder(source: str, columns: Columns) -> Iterator[Record]:
    metadata = _metadata(source)
    readers = {".csv": tables.read, ".jsonl": json_files.read_lines, ".parquet": hugging_face.read_parquet}
    yield from readers[metadata.suffix](str(metadata), columns)


def _metadata(source: str) -> Path | None:
    return next((Path(source, name) for name in METADATA if Path(source, name).is_file()), None)


def _has(source: str, *endings: str) -> bool:
    return Path(source).is_dir() and any(path.name.lower().endswith(endings) for path in _walk(source))


AUDIOFOLDER = Format(
    "Hugging Face's audiofolder (metadata.csv or .jsonl with file_name)",
    lambda source: _metadata(source) is not None,
    read_audiofolder,
    lambda source: [_metadata(source)],
)
LIBRISPEECH = Format(
    "LibriSpeech's layout",
    lambda source: _has(source, ".trans.txt"),
    read_librispeech,
    lambda source: files_in(Path(source)),
)
PAIRS = Format(
    "a folder of audio with a .txt beside each file",
    lambda source: _has(source, *ENDINGS),
    read_pairs,
    lambda source: files_in(Path(source)),
)
