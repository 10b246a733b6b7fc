"""What the preparations of corpora share: work is done once for the same files, and faults are told all at once."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cald_speech.data.audio import MIN_SAMPLES, SAMPLE_RATE, AudioError, audio_info
from cald_speech.data.manifests import Entry, manifest_hash, write_manifest
from cald_speech.errors import UserError, some_of
from cald_speech.files import whole_file

logger = logging.getLogger(__name__)


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
    is_there = record.is_file() and manifest.is_file()
    if is_there and json.loads(record.read_text()) == {"files": fingerprint, "manifest": manifest_hash(manifest)}:
        return
    write_manifest(manifest, make())
    with whole_file(record) as unfinished:
        unfinished.write_text(json.dumps({"files": fingerprint, "manifest": manifest_hash(manifest)}))


def _fingerprint(sources: Sequence[Path], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for path in sources:
        stat = path.stat() if path.exists() else None
        digest.update((f"{path} missing\n" if stat is None else f"{path} {stat.st_size} {stat.st_mtime_ns}\n").encode())
    if settings:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


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


def durations_s(paths: Iterable[Path], *, rate: int | None = None) -> tuple[dict[Path, float], list[str]]:
    """The duration of each file that `usable_s` accepts, and what is wrong with the others."""
    found, faults = {}, []
    for path in paths:
        try:
            found[path] = usable_s(path, rate=rate)
        except AudioError as error:
            faults.append(str(error))
    return found, faults


def refuse(name: str, expected: str, what: str, culprits: Sequence[str], way_out: str) -> None:
    """Raise UserError with the first of the ``culprits``, if there is one."""
    if culprits:
        raise UserError(
            f"{name}: expected {expected}, but there are {len(culprits)} {what}: {some_of(culprits)}. {way_out}"
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
