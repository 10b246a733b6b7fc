"""Whole chapters of Mini LibriSpeech's held-out speakers, each one recording again, and the manifest of its utterances.

LibriSpeech cut its chapters at silences; the utterances, joined in the order of their ids, are the reading as it was.
Two layouts are read: <data_folder>[/librispeech_mini]/manifest.tsv (id, speaker, text) beside ogg/<id>.ogg, and
LibriSpeech's own, <data_folder>[/LibriSpeech]/train-clean-5/<speaker>/<chapter>/.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from cald_speech.data.audio import SAMPLE_RATE, read_audio, write_audio
from cald_speech.data.manifests import durations_s, prepare_once, read_manifest, refuse
from cald_speech.data.readers.folders import read_librispeech
from cald_speech.data.readers.records import Columns
from cald_speech.data.readers.tables import rows_of
from cald_speech.errors import UserError
from cald_speech.files import settle, sweep
from cald_speech.recipes.general.prepare import CORPORA

logger = logging.getLogger(__name__)

SPEAKERS = CORPORA["librispeech_mini"].long_form  # of whom the general teacher has heard nothing
_SUBSET = "train-clean-5"
_WAY_OUT = (
    "Get train-clean-5.tar.gz (332 MB) from https://www.openslr.org/31, unpack it and pass the folder with "
    "LibriSpeech/ in it as --data_folder."
)
_Said = tuple[str, str, Path]  # id, text, audio


def prepare(data_folder: Path, output_folder: Path, *, speakers: Sequence[str] = SPEAKERS) -> dict[str, Path]:
    """Write output_folder/audio/<chapter>.flac and output_folder/manifests/chapters.json; return {"test": manifest}.

    An entry of the manifest is an utterance: a segment of its chapter's file, with "start_s".

    Raises: UserError, naming what is missing or cannot be used.
    """
    sources, said = _read(Path(data_folder).absolute())
    said = sorted(one for one in said if one[0].split("-")[0] in speakers)
    missing = sorted(set(speakers) - {one[0].split("-")[0] for one in said})
    refuse("chapters", "the held-out speakers", "without an utterance", missing, _WAY_OUT)
    by_chapter: dict[str, list[_Said]] = {}
    for one in said:
        by_chapter.setdefault("-".join(one[0].split("-")[:2]), []).append(one)
    folder = Path(output_folder).absolute()
    manifest = folder / "manifests" / "chapters.json"
    if not all(_file(folder, chapter).is_file() for chapter in by_chapter):
        manifest.unlink(missing_ok=True)
    audio = [path for _, _, path in said]
    prepare_once(manifest, [*sources, *audio], partial(_join, by_chapter, folder), chapters=sorted(by_chapter))
    for chapter, utterances in chapters_of(manifest).items():
        minutes = sum(entry["duration_s"] for entry in utterances.values()) / 60
        logger.info("%s: %.1f min, %d utterances", chapter, minutes, len(utterances))
    return {"test": manifest}


def chapters_of(manifest: Path) -> dict[str, dict[str, dict]]:
    """{chapter: {utterance: entry}} of a manifest, in the order of reading."""
    found: dict[str, dict[str, dict]] = {}
    for key, entry in sorted(read_manifest(manifest).items()):
        found.setdefault(Path(entry["audio"]).stem, {})[key] = entry
    return found


def _file(folder: Path, chapter: str) -> Path:
    return folder / "audio" / f"{chapter}.flac"


def _read(data_folder: Path) -> tuple[list[Path], list[_Said]]:
    """The files that say what there is, and the utterances."""
    for folder in (data_folder, data_folder / "librispeech_mini"):
        if (table := folder / "manifest.tsv").is_file():
            rows = list(rows_of(table))
            bad = [place for place, row in rows if not {"id", "text"} <= row.keys()]
            refuse(str(table), "the columns id and text", "lines without", bad, _WAY_OUT)
            return [table], [(row["id"], row["text"], folder / "ogg" / f"{row['id']}.ogg") for _, row in rows]
    for folder in (data_folder / _SUBSET, data_folder / "LibriSpeech" / _SUBSET):
        if folder.is_dir():
            records = list(read_librispeech(str(folder), Columns()))
            return sorted(folder.rglob("*.trans.txt")), [(one.id, one.text, one.audio) for one in records]
    raise UserError(
        f"expected Mini LibriSpeech in {data_folder}, as manifest.tsv or {_SUBSET}/, but there is neither. {_WAY_OUT}"
    )


def _join(by_chapter: dict[str, list[_Said]], folder: Path) -> dict[str, dict]:
    _, faults = durations_s(path for said in by_chapter.values() for _, _, path in said)
    refuse("chapters", "readable audio for each utterance", "files that cannot be used", faults, _WAY_OUT)
    sweep(folder / "audio")
    entries = {}
    for chapter, said in by_chapter.items():
        parts, path, start = [read_audio(audio) for _, _, audio in said], _file(folder, chapter), 0
        write_audio(path, torch.cat(parts))
        for (key, text, _), part in zip(said, parts, strict=True):
            times = {"start_s": start / SAMPLE_RATE, "duration_s": len(part) / SAMPLE_RATE}
            entries[key] = {"audio": path, **times, "text": text, "speaker": key.split("-")[0]}
            start += len(part)
    settle()
    return entries
