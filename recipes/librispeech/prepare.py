"""LibriSpeech's folders to manifests; any corpus in the same layout will do.

<data_folder>[/LibriSpeech]/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<utterance>.flac, and in each chapter one
<speaker>-<chapter>.trans.txt with a line "<utterance id> <TRANSCRIPT>" for each of its files.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from cald_speech.data.audio import MIN_SAMPLES, SAMPLE_RATE, AudioError, audio_info
from cald_speech.data.manifests import manifest_hash, write_manifest
from cald_speech.errors import UserError
from cald_speech.files import whole_file

logger = logging.getLogger(__name__)

OFFICIAL_COUNTS = {
    "train-clean-100": 28_539,
    "train-clean-360": 104_014,
    "train-other-500": 148_688,
    "dev-clean": 2_703,
    "dev-other": 2_864,
    "test-clean": 2_620,
    "test-other": 2_939,
}
_SHOWN = 5
_WAY_OUT = (
    "LibriSpeech is at https://www.openslr.org/12: unpack its archives side by side and pass --data_folder. "
    "`make demo` runs without any data."
)


def prepare(data_folder: Path, output_folder: Path, splits: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Write output_folder/manifests/<name>.json for each name in `splits` and return {name: that path}.

    `splits` says which folders make up a manifest: {"train": ["train-clean-100"], "valid": ["dev-clean"],
    "test-clean": ["test-clean"]}. A manifest is written again only where its files changed (names, sizes, times) or it
    was edited. Transcripts are kept as they stand: normalising them is the data set's part.

    Raises: UserError, naming what is missing: the folder, a split, transcripts, audio; or audio that cannot be read.
    """
    root = _corpus_root(Path(data_folder))
    manifests = {}
    for name, folders in splits.items():
        manifests[name] = Path(output_folder) / "manifests" / f"{name}.json"
        sources = [path for folder in folders for path in _files(root, folder)]
        fingerprint = _fingerprint(sources)
        if _is_done(manifests[name], fingerprint):
            continue
        write_manifest(manifests[name], _entries(name, sources))
        with whole_file(_record(manifests[name])) as unfinished:
            unfinished.write_text(json.dumps({"files": fingerprint, "manifest": manifest_hash(manifests[name])}))
    return manifests


def _corpus_root(data_folder: Path) -> Path:
    if not data_folder.is_dir():
        raise UserError(f"expected LibriSpeech in the folder {data_folder}, but there is no such folder. {_WAY_OUT}")
    inner = data_folder / "LibriSpeech"
    return (inner if inner.is_dir() else data_folder).absolute()


def _files(root: Path, split: str) -> list[Path]:
    """All audio and transcript files of one split, sorted."""
    folder = root / split
    if not folder.is_dir():
        present = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
        raise UserError(
            f"expected the split {split} in the folder {folder}, but it is not there (folders that are: {present}). "
            f"Choose other splits, or get it. {_WAY_OUT}"
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix == ".flac" or path.name.endswith(".trans.txt"))
    count = sum(path.suffix == ".flac" for path in files)
    if count == 0:
        raise UserError(f"expected {split}/<speaker>/<chapter>/*.flac under {root}, but there is none. {_WAY_OUT}")
    expected = OFFICIAL_COUNTS.get(split, count)
    if count != expected:
        logger.warning(
            "%s holds %d utterances, but the official %s has %d: error rates on it do not compare with published ones.",
            *(folder, count, split, expected),
        )
    return files


def _entries(name: str, sources: Sequence[Path]) -> dict[str, dict]:
    """Match audio with transcripts; everything that is wrong is told at once."""
    audio = {path.stem: path for path in sources if path.suffix == ".flac"}
    texts: dict[str, str] = {}
    for path in sources:
        if path.suffix == ".txt":
            texts.update(_read_transcripts(path))
    _refuse(name, "audio files without a transcript", [str(audio[u]) for u in audio if not texts.get(u)])
    _refuse(name, "transcripts without an audio file", [u for u in texts if u not in audio])
    entries, faults = {}, []
    for utterance, path in audio.items():
        try:
            num_samples, rate = audio_info(path)
        except AudioError as error:
            faults.append(str(error))
            continue
        if num_samples * SAMPLE_RATE < MIN_SAMPLES * rate:
            faults.append(f"{path}: {num_samples} samples, shorter than one frame of 25 ms")
        duration_s, speaker = num_samples / rate, utterance.split("-")[0]
        entries[utterance] = {"audio": path, "duration_s": duration_s, "text": texts[utterance], "speaker": speaker}
    _refuse(name, "audio files that cannot be used", faults)
    return entries


def _read_transcripts(path: Path) -> dict[str, str]:
    lines = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {parts[0]: parts[1].strip() if len(parts) == 2 else "" for parts in lines}


def _refuse(name: str, what: str, culprits: Sequence[str]) -> None:
    if culprits:
        more = f" and {len(culprits) - _SHOWN} more" if len(culprits) > _SHOWN else ""
        raise UserError(
            f"{name}: expected one transcript and one readable audio file for each utterance, but there are "
            f"{len(culprits)} {what}: {'; '.join(culprits[:_SHOWN])}{more}. Unpack the archive of this split again, or "
            f"remove what has no counterpart."
        )


def _fingerprint(sources: Sequence[Path]) -> str:
    stats = ((path, path.stat()) for path in sources)
    lines = (f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _record(manifest: Path) -> Path:
    return manifest.with_name(f".{manifest.stem}.prepared")


def _is_done(manifest: Path, fingerprint: str) -> bool:
    record = _record(manifest)
    if not record.is_file() or not manifest.is_file():
        return False
    return json.loads(record.read_text()) == {"files": fingerprint, "manifest": manifest_hash(manifest)}
