"""LibriSpeech's folders to manifests; any corpus in the same layout will do.

<data_folder>[/LibriSpeech]/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<utterance>.flac (or .wav, .ogg, .opus), and
in each chapter one <speaker>-<chapter>.trans.txt with a line "<utterance id> <TRANSCRIPT>" for each of its files.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cald_speech.data.manifests import durations_s, prepare_once, refuse
from cald_speech.data.readers.folders import audio_among, files_in, match_chapters
from cald_speech.errors import UserError

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
        prepare_once(manifests[name], sources, partial(_entries, name, sources))
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
    files = files_in(folder)
    count = len(audio_among(files))
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
    audio, texts = match_chapters(sources)
    silent = [path for path in audio if not texts.get(path, ("", ""))[1]]
    _refuse(name, "audio files without a transcript", [str(path) for path in silent])
    _refuse(name, "transcripts without an audio file", [path.stem for path in texts if path not in set(audio)])
    durations, faults = durations_s(audio)
    _refuse(name, "audio files that cannot be used", faults)
    return {
        path.stem: {
            "audio": path,
            "duration_s": durations[path],
            "text": texts[path][1],
            "speaker": path.stem.split("-")[0],
        }
        for path in audio
    }


def _refuse(name: str, what: str, culprits: Sequence[str]) -> None:
    way_out = "Unpack the archive of this split again, or add what is missing."
    refuse(name, "one transcript and one readable audio file for each utterance", what, culprits, way_out)
