"""Audio inside of tar archives: WebDataset's shards, and lhotse's (cuts.000000.jsonl.gz with recording.000000.tar).

A source is one archive or a folder of them. Archives are read through once, member by member, and none is unpacked
under the name it gives itself.
"""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cald_speech.data.encodings import decoded
from cald_speech.data.readers import cuts
from cald_speech.data.readers.folders import ENDINGS
from cald_speech.data.readers.json_files import object_of, objects_of
from cald_speech.data.readers.records import Columns, Format, Record
from cald_speech.errors import UserError

TARS = (".tar", ".tar.gz", ".tgz")
_TEXTS = (".txt", ".cls")


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


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {ending: content}) of each group of members whose names are the same up to their ending, one by one."""
    key, parts = None, {}
    for name, content in _members(path):
        at = PurePosixPath(name)
        stem, _, ending = at.name.partition(".") if at.suffix not in ENDINGS else (at.stem, ".", at.suffix[1:])
        if at.suffix in (".json", *_TEXTS):
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
                if not member.isfile():
                    continue
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
    return [path] if path.is_file() else sorted(at for at in path.iterdir() if at.name.endswith(TARS))


def _tables(source: str) -> list[Path]:
    return sorted(Path(source).glob("cuts.*.jsonl")) + sorted(Path(source).glob("cuts.*.jsonl.gz"))


WEBDATASET = Format(
    "WebDataset's shards (.tar)",
    lambda source: (
        Path(source).exists() and any(at.name.endswith(TARS) for at in _archives(source))
        if Path(source).is_dir()
        else source.endswith(TARS) and Path(source).is_file()
    ),
    read_webdataset,
    _archives,
    embeds=True,
)
SHAR = Format(
    "lhotse's shards (cuts.*.jsonl.gz, recording.*.tar)",
    lambda source: Path(source).is_dir() and bool(_tables(source)),
    read_shar,
    lambda source: [*_tables(source), *_archives(source)],
    embeds=True,
)
