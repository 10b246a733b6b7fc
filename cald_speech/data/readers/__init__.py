"""Corpora in the formats that people bring, all to one manifest of ours: CSV, JSON, Kaldi, hub, shards, folders.

`FORMATS` is the table of them. A format is one file here, which gives a :class:`Record` for each utterance; what all
have in common, the columns' names, durations, segments, ids, is done once, in ``records`` and here.
"""

import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cald_speech.data.audio import MIN_SAMPLES, SAMPLE_RATE, AudioError
from cald_speech.data.manifests import (
    look_up,
    prepare_once,
    read_manifest,
    refuse_or_drop,
    total_duration_s,
)
from cald_speech.data.readers import folders, hugging_face, json_files, kaldi, shards, tables
from cald_speech.data.readers.records import Columns, Format, Record, is_unicode
from cald_speech.errors import UserError
from cald_speech.files import from_home, settle, sweep, whole_file

logger = logging.getLogger(__name__)

# The first that matches is taken: a folder may have audio and a table of it.
FORMATS: Sequence[Format] = (
    hugging_face.HUB,
    shards.NEMO_TARRED,
    tables.FORMAT,
    json_files.WHOLE,
    json_files.LINES,
    hugging_face.PARQUET,
    kaldi.FORMAT,
    shards.SHAR,
    folders.AUDIOFOLDER,
    folders.LIBRISPEECH,
    folders.PAIRS,
    shards.WEBDATASET,
)
# Ends of segments are often written with two decimals: so much beyond the end of the file is the end.
ROUNDING_S = 0.02
LOOKED_UP = 16  # durations of so many files are looked up where all are given
_MEND = "Correct the paths, which are relative to the file that names them, or copy the files again"


def format_of(source: str) -> Format:
    """The format that a source is in. Raises UserError, naming all formats, where it is in none."""
    found = next((form for form in FORMATS if form.matches(source)), None)
    if found is None:
        known = "; ".join(form.name for form in FORMATS)
        is_there = (
            "in one of the formats known" if os.path.exists(source) else "but there is no such manifest or folder"
        )
        raise UserError(f"{source}: expected a corpus, {is_there}. Formats: {known}.")
    return found


def read_corpus(*sources: str | Path, columns: Mapping[str, Any] | None = None) -> Iterator[Record]:
    """The utterances of corpora in any of the `FORMATS`, one by one, as they stand there.

    Arguments
    ---------
    sources : files, folders, or addresses ``hf://owner/name?split=train``.
    columns : which column holds what, as `Columns`.

    Raises
    ------
    UserError
        for a source in no known format, and whatever is malformed, with file and line; where an id comes twice, with
        both places.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.csv"
    >>> _ = path.write_text("path,sentence\\nclips/a.wav,hello\\n")
    >>> [(record.id, record.text) for record in read_corpus(path)]
    [('clips/a', 'hello')]
    """
    known, places = Columns(columns), {}
    for source in map(str, sources):
        for record in format_of(source).read(source, known):
            if not is_unicode(f"{record.id}{record.audio if isinstance(record.audio, Path) else ''}"):
                raise UserError(
                    f"{record.place}: expected names of files and folders in UTF-8, got {record.id!r}. Rename it."
                )
            if record.id in places:
                raise UserError(
                    f"{record.place}: expected each utterance once, but {record.id!r} is in {places[record.id]} too. "
                    "Leave one of them out, or give ids that differ."
                )
            places[record.id] = record.place
            yield record


def prepare_corpus(
    manifest: str | Path,
    *sources: str | Path,
    columns: Mapping[str, Any] | None = None,
    drop_bad_audio: bool = False,
) -> None:
    """Write the utterances of ``sources`` as a manifest of ours, unless it stands there already, of the same files.

    Durations that a corpus does not give are looked up. Audio inside of archives or tables is written into
    <folder of the manifest>/audio/<its name>. ``drop_bad_audio`` leaves out what is missing, damaged, shorter than a
    frame or beyond the end of its file, instead of refusing it.

    Raises: UserError, as `read_corpus`, and for audio that cannot be used, all of it at once.
    """
    manifest, forms = Path(manifest), [format_of(str(source)) for source in sources]
    audio = manifest.parent / "audio" / manifest.stem
    files = [path for form, source in zip(forms, sources, strict=True) for path in form.files(str(source))]
    records: Iterable[Record] = read_corpus(*sources, columns=columns)
    embeds = any(form.embeds for form in forms)
    if not embeds:
        records = list(records)
        files += [record.audio for record in records if isinstance(record.audio, Path)]
        embeds = any(callable(record.audio) for record in records)
    if embeds:
        record = manifest.with_name(f".{manifest.stem}.prepared")
        if manifest.is_file() and record.is_file() and not _audio_is_there(manifest):
            record.unlink()  # what was written there is gone: it is written again
    make = partial(_entries, manifest.stem, records, audio, drop_bad_audio)
    settings = {"given": [str(source) for source in sources], "columns": columns or {}, "drop": drop_bad_audio}
    prepare_once(manifest, files, make, **settings)
    hours = total_duration_s(manifest) / 3600
    logger.info("%s: %d utterances, %.2f h (%s)", manifest.stem, len(read_manifest(manifest)), hours, forms[0].name)


def manifest_of(source: str | Path, columns: Mapping[str, Any] | None = None) -> Path:
    """The manifest of ours that a source is, or one in the user's cache made of it, by `prepare_corpus`.

    Raises: UserError, as `prepare_corpus`, and where there is nowhere to keep it.
    """
    source = from_home(str(source))
    if not columns and source.lower().endswith(".json") and _is_ours(source):
        return Path(source)
    key = hashlib.sha256(f"{os.path.abspath(source)} {columns or {}}".encode()).hexdigest()[:16]
    manifest = _cache() / key / f"{name_of(source)}.json"
    try:
        prepare_corpus(manifest, source, columns=columns)
    except OSError as error:
        raise UserError(
            f"{source}: its manifest cannot be kept in {manifest.parent} ({error}): set CALD_SPEECH_CACHE to a folder."
        ) from error
    return manifest


def name_of(source: str | Path) -> str:
    """What a source is called in reports.

    Example
    -------
    >>> name_of("data/test.jsonl.gz"), name_of("hf://owner/name?split=test")
    ('test', 'owner-name-test')
    """
    if str(source).startswith("hf:"):
        name, options = hugging_face.parse(str(source))
        return "-".join([name.replace("/", "-"), *(options[k] for k in ("config", "split") if k in options)])
    name = Path(os.path.abspath(str(source).partition("?tars=")[0])).name
    while Path(name).suffix.lower() in (".gz", ".tgz", ".tar", ".csv", ".tsv", ".tab", ".json", ".jsonl", ".parquet"):
        name = Path(name).stem
    return name or "corpus"


def _entries(name: str, records: Iterable[Record], audio_folder: Path, drop_bad_audio: bool) -> dict[str, dict]:
    """What a manifest has of the records. All that is wrong with audio is told at once."""
    if audio_folder.is_dir():
        sweep(audio_folder)
    records = [_written(record, audio_folder) for record in records]
    if audio_folder.is_dir():
        settle()
    unsure = {record.audio for record in records if record.duration_s is None or record.start_s is not None}
    told = [record for record in records if record.audio not in unsure]
    some = told[:: max(1, len(told) // LOOKED_UP)]
    found = look_up(sorted(unsure | {record.audio for record in some}))
    for record in some:
        _compare(record, found[record.audio])
    entries, faults = {}, []
    for record in records:
        try:
            extent = _extent(record, found.get(record.audio))
        except AudioError as error:
            faults.append(f"{record.place}: {error}")
            continue
        text = unicodedata.normalize("NFC", record.text.strip())  # one label is not two
        entries[record.id] = {"audio": record.audio, **extent, "text": text, **record.more}
    expected, what = "audio that can be read for each utterance", "that cannot be used"
    refuse_or_drop(name, expected, what, faults, _MEND, drop_bad_audio=drop_bad_audio)
    if not entries:
        raise UserError(f"{name}: expected at least one utterance, but there is none in what was given.")
    return entries


def _compare(record: Record, found: float | AudioError) -> None:
    """Raise UserError where a corpus has durations that are not those of its files in seconds: others believe them."""
    if isinstance(found, float) and abs(found - record.duration_s) > max(0.5, 0.1 * found):
        raise UserError(
            f"{record.place}: expected the duration of {record.audio} in seconds, {found:.2f}, got "
            f"{record.duration_s:g}. Correct the column, or rename it, and durations are looked up; of a part of a "
            "file say where it begins, too (start or offset)."
        )


def _extent(record: Record, found: float | AudioError | None) -> dict[str, float]:
    """start_s and duration_s; a segment that is all of its file is no segment. Raises AudioError for what cannot be."""
    if isinstance(found, AudioError):
        raise found
    if found is None and not os.path.isfile(record.audio):
        raise AudioError(f"{record.audio}: there is no such audio file.")
    start_s = record.start_s or 0.0
    end_s = found if record.duration_s is None else start_s + record.duration_s
    if found is not None and end_s > found + ROUNDING_S:
        raise AudioError(f"the segment ends at {end_s:g} s, but {record.audio} at {found:g} s")
    end_s = end_s if found is None else min(end_s, found)
    if (end_s - start_s) * SAMPLE_RATE < MIN_SAMPLES:
        raise AudioError(f"{record.audio}: {end_s - start_s:g} s are shorter than one frame of 25 ms")
    is_whole = record.start_s is None or (start_s == 0 and end_s >= found - 1e-4)
    return {"duration_s": end_s} if is_whole else {"start_s": start_s, "duration_s": end_s - start_s}


def _written(record: Record, folder: Path) -> Record:
    """The record with its audio in a file."""
    if isinstance(record.audio, Path):
        return record
    name = quote(record.id, safe="")
    if len(name) > 150:
        name = f"{name[:100]}-{hashlib.sha256(record.id.encode()).hexdigest()[:16]}"
    path = folder.absolute() / (name.replace(".", "%2E") + (record.suffix if record.suffix in folders.ENDINGS else ""))
    with whole_file(path, durable=False) as unfinished:
        unfinished.write_bytes(record.audio() if callable(record.audio) else record.audio)
    return replace(record, audio=path)


def _audio_is_there(manifest: Path) -> bool:
    try:
        return all(os.path.isfile(entry["audio"]) for entry in read_manifest(manifest).values())
    except UserError:
        return False


def _is_ours(path: str) -> bool:
    try:
        return all(os.path.isabs(entry["audio"]) for entry in read_manifest(path).values())
    except UserError:
        return False


def _cache() -> Path:
    try:
        chosen = os.environ.get("CALD_SPEECH_CACHE")
        folder = Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cald_speech")
    except RuntimeError as error:
        raise UserError(f"manifests have nowhere to be kept ({error}): set CALD_SPEECH_CACHE to a folder.") from error
    with suppress(OSError):  # compiled kernels lie there too: nobody else may write to it, whatever the umask
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / "manifests"
