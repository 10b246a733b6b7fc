"""Manifests: what a recipe's prepare() leaves of a corpus of audio, and everything after it reads.

A manifest is one JSON file {utterance id: {"audio": absolute path, "duration_s": seconds, "text": transcript}}. With
"start_s" an utterance is a segment of its file, "duration_s" seconds from there on; without, it is the whole file. More
keys, such as "speaker", are welcome. SpeechBrain's `DynamicItemDataset.from_json` reads it too, but fills in braces, so
a path or transcript with "{" needs `cald_speech.data.dataset.make_dataset`.

Whatever format a corpus has, its reader makes such entries. What readers share stands at the end: work is done once for
the same files (`prepare_once`), and faults are told all at once (`durations_s`, `refuse`).
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cald_speech.data.audio import MIN_SAMPLES, SAMPLE_RATE, AudioError, audio_info
from cald_speech.data.encodings import read_text
from cald_speech.errors import UserError, some_of
from cald_speech.files import clear, once, whole_file

logger = logging.getLogger(__name__)
Entry = Mapping[str, Any]
_MANY = 64  # files, from which on they are looked at several at once
_MEND = "Prepare the data again, or mend the file by hand."


def write_manifest(path: str | Path, entries: Mapping[str, Entry]) -> None:
    """Write `entries`, sorted by utterance id, starts and durations rounded to 0.1 ms. Atomic.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "test.json"
    >>> write_manifest(path, {"a": {"audio": "/data/a.flac", "duration_s": 1.23456, "text": "HELLO"}})
    >>> read_manifest(path)["a"]["duration_s"]
    1.2346
    """
    lines = []
    for utterance, entry in sorted(entries.items()):
        seconds = {key: round(float(entry[key]), 4) for key in ("start_s", "duration_s") if key in entry}
        rounded = {**entry, "audio": str(entry["audio"]), **seconds}
        lines.append(f"{json.dumps(utterance)}: {json.dumps(rounded, ensure_ascii=False)}")
    # one utterance per line: a manifest can be read, searched and compared with line tools
    clear(path)
    with whole_file(path) as unfinished:
        unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read_manifest(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read and check a manifest: at least one utterance, each with "audio", "duration_s" > 0 and "text"; a segment has
    "start_s" >= 0 too.

    Raises: UserError, naming the file and what is wrong in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such manifest. Prepare the data first, or correct the path.")
    try:
        entries = json.loads(read_text(path, "a JSON manifest"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON manifest, but it cannot be parsed ({error}). {_MEND}") from error
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: expected at least one utterance, as {{id: {{...}}}}, but there is none. {_MEND}")
    for utterance, entry in entries.items():
        fault = _fault(entry)
        if fault:
            raise UserError(f"{path}: utterance {utterance}: {fault}. {_MEND}")
    return entries


def manifest_hash(path: str | Path) -> str:
    """SHA-256 (hex) over id, duration, text and, of a segment, start of each utterance, in the order of the ids.

    Paths do not count, so the same data has the same hash on every machine. Raises: UserError, as `read_manifest`.
    """
    digest = hashlib.sha256()
    for utterance, entry in sorted(read_manifest(path).items()):
        facts = [utterance, f"{entry['duration_s']:.4f}", entry["text"]]
        line = json.dumps([*facts, f"{entry['start_s']:.4f}"] if "start_s" in entry else facts)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def total_duration_s(path: str | Path) -> float:
    """The summed duration of a manifest in seconds. Raises: UserError, as `read_manifest`."""
    return math.fsum(entry["duration_s"] for entry in read_manifest(path).values())


def prepare_once(
    manifest: str | Path, sources: Sequence[Path], make: Callable[[], Mapping[str, Entry]], **settings
) -> None:
    """Write what ``make()`` returns as a manifest, unless it stands there already.

    It is made again where its ``sources`` changed (names, sizes, times), or the ``settings`` that ``make`` depends on
    (JSON values), or the manifest was edited.
    """
    manifest = Path(manifest)
    record = manifest.with_name(f".{manifest.stem}.prepared")
    fingerprint = _fingerprint(sources, settings)

    def is_made() -> bool:
        return _recorded(record) == fingerprint and _recorded(record, "manifest") == _hash_if_whole(manifest)

    def write() -> None:
        clear(record)
        write_manifest(manifest, make())
        with whole_file(record) as unfinished:
            unfinished.write_text(json.dumps({"files": fingerprint, "manifest": manifest_hash(manifest)}))

    once(manifest.parent, manifest.stem, is_made, write)


def usable_s(path: Path, *, rate: int | None = None) -> float:
    """The duration of an audio file in seconds.

    Raises: AudioError, where it is missing, cut off, no audio, shorter than one frame, or of another ``rate`` than is
    given.
    """
    num_samples, its_rate = audio_info(path)
    if rate not in (None, its_rate):
        raise AudioError(f"{path}: expected {rate} Hz, but it has {its_rate}")
    if num_samples * SAMPLE_RATE < MIN_SAMPLES * its_rate:
        raise AudioError(f"{path}: {num_samples} samples, shorter than one frame of 25 ms")
    return num_samples / its_rate


def look_up(paths: Iterable[Path], *, rate: int | None = None) -> dict[Path, float | AudioError]:
    """The duration of each file as `usable_s`, or what is wrong with it; of many files several at once, with a bar."""

    def one(path: Path) -> float | AudioError:
        try:
            return usable_s(path, rate=rate)
        except AudioError as error:
            return error

    paths = list(paths)
    if len(paths) < _MANY:
        return {path: one(path) for path in paths}
    bar = partial(tqdm, total=len(paths), desc="durations", unit="file", disable=None, leave=False)
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:  # disks and networks answer several at once
        return dict(zip(paths, bar(pool.map(one, paths)), strict=True))


def durations_s(paths: Iterable[Path], *, rate: int | None = None) -> tuple[dict[Path, float], list[str]]:
    """The duration of each file that `usable_s` accepts, and what is wrong with the others."""
    found = look_up(paths, rate=rate)
    faults = [str(error) for error in found.values() if isinstance(error, AudioError)]
    return {path: value for path, value in found.items() if not isinstance(value, AudioError)}, faults


def refuse(name: str, expected: str, what: str, culprits: Sequence[str], way_out: str) -> None:
    """Raise UserError with the first of the ``culprits``, if there is one."""
    if culprits:
        raise UserError(
            f"{name}: expected {expected}, but there are {len(culprits)} {what}: "
            f"{some_of([culprit.rstrip('.') for culprit in culprits])}. {way_out}"
        )


def refuse_or_drop(
    name: str, expected: str, what: str, culprits: Sequence[str], way_out: str, *, drop_bad_audio: bool
) -> None:
    """The same, or a warning where the user said that they be left out: ``corpus: {drop_bad_audio: True}``."""
    if not drop_bad_audio:
        leave_out = "or leave them out with corpus: {drop_bad_audio: True} in the experiment"
        refuse(name, expected, what, culprits, f"{way_out}, {leave_out}.")
    elif culprits:
        logger.warning("%s: left out %d %s: %s", name, len(culprits), what, some_of(culprits))


def _fault(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"expected an object with audio, duration_s and text, but found {entry!r}"
    for key in ("audio", "text"):
        if not isinstance(entry.get(key), str):
            return f'expected a string as "{key}", but found {entry.get(key)!r}'
    duration_s = entry.get("duration_s")
    if not isinstance(duration_s, int | float) or not 0 < duration_s < math.inf:
        return f'expected a positive number of seconds as "duration_s", but found {duration_s!r}'
    start_s = entry.get("start_s", 0)
    if not isinstance(start_s, int | float) or not 0 <= start_s < math.inf:
        return f'expected a number of seconds from 0 on as "start_s", but found {start_s!r}'
    return ""


def _recorded(record: Path, what: str = "files") -> str | None:
    """What the record of a preparation says; None where there is none, or it is damaged."""
    try:
        return json.loads(record.read_text()).get(what)
    except (OSError, ValueError, AttributeError):
        return None


def _hash_if_whole(manifest: Path) -> str:
    try:
        return manifest_hash(manifest)
    except UserError:
        return ""


def _fingerprint(sources: Sequence[Path], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for path in sources:
        try:
            stat = os.stat(path)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            stat = None
        seen = "missing" if stat is None else f"{stat.st_size} {stat.st_mtime_ns}"
        digest.update(f"{path} {seen}\n".encode("utf-8", "surrogateescape"))
    if settings:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()
