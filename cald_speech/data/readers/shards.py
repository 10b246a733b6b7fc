"""Audio inside of tar archives: WebDataset's shards, lhotse's (cuts.000000.jsonl.gz with recording.000000.tar), NeMo's.

A source is one archive, a folder of them, or a pattern of their names: ``a_{000..127}.tar``, or as NeMo writes it,
``a__OP_0..127_CL_.tar``. Archives are read through once, member by member, and none is unpacked under the name it gives
itself.
"""

import logging
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cald_speech.data.encodings import decoded
from cald_speech.data.readers import cuts
from cald_speech.data.readers.folders import ENDINGS
from cald_speech.data.readers.json_files import object_of, objects_of
from cald_speech.data.readers.records import Columns, Format, Record
from cald_speech.errors import UserError

logger = logging.getLogger(__name__)

TARS = (".tar", ".tar.gz", ".tgz")
_RANGE = re.compile(r"(?:_OP_|\{)([0-9]{1,6})\.\.([0-9]{1,6})(?:_CL_|\})")
_MOST = 100_000  # archives of a pattern
_NEMO = "tarred_audio_manifest.json"
_TEXTS = (".txt", ".cls")
MOST_OF_A_MEMBER = 2**30  # bytes, nine hours of WAV: a header decides no memory


def read_webdataset(source: str, columns: Columns) -> Iterator[Record]:
    """Members with one name and several endings: audio, and its text in .txt, label in .cls, or columns in .json."""
    for path in _archives(source):
        for key, parts in _samples(path):
            place = f"{path}: {key}"
            audio = [ending for ending in parts if ending in ENDINGS]
            if len(audio) != 1:
                raise UserError(f"{place}: expected one audio file, got the endings {', '.join(parts)}.")
            content = {"bytes": parts[audio[0]], "path": f"a{audio[0]}"}
            row = {} if ".json" not in parts else object_of(decoded(parts[".json"], place), place, "a JSON object")
            beside = next((ending for ending in _TEXTS if ending in parts), None)
            if beside is not None and "text" not in columns.given:
                row["text"] = decoded(parts[beside], place).strip()
            yield columns.record({**row, "audio": content}, place, path.absolute().parent, name=key)


def read_shar(source: str, columns: Columns) -> Iterator[Record]:
    """Each cut with the recording of its id, in the archive of the same number."""
    for table in _tables(source):
        archive = table.with_name(f"recording.{table.name.split('.')[1]}.tar")
        rows = {}
        for place, row in objects_of(table):
            rows[row.get("id")] = place, row
        for key, parts in _samples(archive):
            audio = [ending for ending in parts if ending in ENDINGS]
            if key not in rows:
                raise UserError(f"{archive}: expected a cut in {table.name} for {key}, but there is none.")
            if len(audio) == 1:
                place, row = rows.pop(key)
                yield cuts.record(row, place, table.absolute().parent, inside=(parts[audio[0]], audio[0]))
        for place, row in rows.values():
            raise UserError(
                f"{place}: expected the audio of the cut {row.get('id')!r} in {archive}, but it is not there."
            )


# --- NeMo's -----------------------------------------------------------------------------------------------------------


def read_nemo(source: str, columns: Columns) -> Iterator[Record]:
    """The lines of the manifests, each with the member of that name; one that ends in -sub2 is a part of its file."""
    manifests, archives = _nemo_files(source)
    rows: dict[str, list[tuple[str, dict[str, Any], str]]] = {}
    for manifest in manifests:
        for place, row in objects_of(manifest):
            column = columns.find(tuple(row), place)["audio"]
            name = PurePosixPath(str(row[column])).stem
            rows.setdefault(re.sub(r"-sub[0-9]+$", "", name), []).append((place, row, name))
    unnamed = 0
    for archive in archives:
        for member, content in _members(archive):
            found = rows.pop(PurePosixPath(member).stem, [])
            unnamed += not found
            for place, row, name in found:
                column = columns.find(tuple(row), place)["audio"]
                audio = {"bytes": content, "path": f"a{PurePosixPath(member).suffix.lower()}"}
                yield columns.record({**row, column: audio}, place, archive.absolute().parent, name=name)
    if unnamed:
        logger.warning("%s: no line of the manifest names %d members of the archives", source, unnamed)
    for place, _, name in (line for lines in rows.values() for line in lines):
        raise UserError(
            f"{place}: expected the audio {name} in one of {len(archives)} archives ({archives[0]}, ...), but it is "
            "not there. Give all of them: MANIFEST?tars=PATTERN"
        )


def _nemo_files(source: str) -> tuple[list[Path], list[Path]]:
    """Manifests and archives: those that are given, or lie beside a manifest, or a folder above a sharded one."""
    given, _, tars = source.partition("?tars=")
    if Path(given).is_dir():
        given = str(Path(given, _NEMO))
    manifests = expanded(given)
    folder = Path(given).absolute().parent
    if tars:
        archives = [path for one in tars.split(",") for path in expanded(str(folder / one))]
    else:
        places = [place for place in (folder, folder.parent) if place.is_dir()]
        archives = next((found for place in places if (found := _archives(str(place)))), [])
    lost = [path for path in (*manifests, *archives) if not path.is_file()]
    if lost or not archives:
        raise UserError(
            f"{lost[0] if lost else folder}: expected NeMo's manifests and archives, but there is no "
            f"{'such file' if lost else '.tar beside the manifest'}. Say where they are: "
            "MANIFEST?tars=audio__OP_0..127_CL_.tar"
        )
    return manifests, archives


def expanded(pattern: str) -> list[Path]:
    """The paths that a pattern stands for; one without a range stands for itself.

    Example
    -------
    >>> [path.name for path in expanded("a__OP_0..2_CL_.tar")], [path.name for path in expanded("b-{08..10}.tar")]
    (['a_0.tar', 'a_1.tar', 'a_2.tar'], ['b-08.tar', 'b-09.tar', 'b-10.tar'])
    """
    found = _RANGE.search(pattern)
    if found is None:
        return [Path(pattern)]
    first, last = found[1], found[2]
    if not 0 <= int(last) - int(first) < _MOST:
        raise UserError(f"{pattern}: expected a range from a number to a higher one, got {found[0]}. Correct it.")
    width = len(first) if first.startswith("0") else 0
    names = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    return [path for name in names for path in expanded(pattern[: found.start()] + name + pattern[found.end() :])]


# --- archives ---------------------------------------------------------------------------------------------------------


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {ending: content}) of each group of members whose names are the same up to their ending, one by one."""
    key, parts = None, {}
    for name, content in _members(path):
        at = PurePosixPath(name)
        stem, _, ending = at.name.partition(".")
        if at.suffix.lower() in {".json", *_TEXTS, *ENDINGS}:
            stem, ending = at.stem, at.suffix[1:]
        this = (at.parent / stem).as_posix()
        if this != key and key is not None:
            yield key, parts
            parts = {}
        key = this
        ending = f".{ending.lower()}"
        if ending in parts:
            raise UserError(f"{path}: {name}: expected each member once, but it is there twice.")
        parts[ending] = content
    if key is not None:
        yield key, parts


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue  # macOS puts ._talk.wav before talk.wav
                if member.size > MOST_OF_A_MEMBER:
                    raise UserError(
                        f"{path}: {member.name}: expected up to {MOST_OF_A_MEMBER:,} bytes, got {member.size:,}. Give "
                        "long recordings as files."
                    )
                content = archive.extractfile(member).read()
                if len(content) < member.size:
                    raise UserError(f"{path}: {member.name}: the archive is cut off. Copy it again.")
                yield member.name, content
            if path.suffix == ".tar" and archive.offset + 512 > path.stat().st_size:
                raise UserError(f"{path}: the archive is cut off, its end is missing. Copy it again.")
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{path}: expected a tar archive, but it cannot be read ({why}). Copy it again.") from error


def _archives(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        return sorted(at for at in path.iterdir() if at.name.endswith(TARS))
    paths = expanded(source)
    lost = [path for path in paths if not path.is_file()]
    if lost:
        raise UserError(f"{source}: expected all of its archives, but there is no {lost[0]}. Correct the range.")
    return paths


def _tables(source: str) -> list[Path]:
    return sorted(Path(source).glob("cuts.*.jsonl")) + sorted(Path(source).glob("cuts.*.jsonl.gz"))


WEBDATASET = Format(
    "WebDataset's shards (.tar)",
    lambda source: (
        Path(source).exists() and any(at.name.endswith(TARS) for at in _archives(source))
        if Path(source).is_dir()
        else source.endswith(TARS) and (Path(source).is_file() or _RANGE.search(source) is not None)
    ),
    read_webdataset,
    _archives,
    embeds=True,
)
NEMO_TARRED = Format(
    "NeMo's tarred audio (tarred_audio_manifest.json, sharded_manifests/manifest__OP_0..127_CL_.json)",
    lambda source: (
        Path(source, _NEMO).is_file()
        or "?tars=" in source
        or (source.endswith((".json", ".jsonl")) and _RANGE.search(source) is not None)
        or (Path(source).name == _NEMO and bool(_archives(str(Path(source).absolute().parent))))
    ),
    read_nemo,
    lambda source: [path for files in _nemo_files(source) for path in files],
    embeds=True,
)
SHAR = Format(
    "lhotse's shards (cuts.*.jsonl.gz, recording.*.tar)",
    lambda source: Path(source).is_dir() and bool(_tables(source)),
    read_shar,
    lambda source: [*_tables(source), *_archives(source)],
    embeds=True,
)
