"""Manifests: the list of utterances that one run trains or tests on.

A manifest is a JSON file {utterance id: {"audio": absolute path, "duration_s": seconds, "text": transcript}}. With
"start_s" an utterance is a segment of its file, "duration_s" seconds from there on; without, it is the whole file. More
keys, such as "speaker", are welcome. SpeechBrain's `DynamicItemDataset.from_json` reads it too, but fills in braces, so
a path or transcript with "{" needs `cald_speech.data.dataset.make_dataset`.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cald_speech.errors import UserError
from cald_speech.files import whole_file

Entry = Mapping[str, Any]


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
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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


_MEND = "Delete the file and prepare the data again, or mend it by hand."


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
