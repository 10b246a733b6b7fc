"""AN4 (CMU's census database) to manifests: the official 948 and 130 utterances, and a dev set of eight train speakers.

Two layouts are read: what CMU distributes, NIST SPHERE in <data_folder>[/an4]/wav/<set>/<speaker>/<id>.sph with
etc/an4_{train,test}.{fileids,transcription}; and <data_folder>[/an4]/manifest.tsv (id, speaker, text, split) beside
flac/<id>.flac.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cald_speech.data.encodings import read_text
from cald_speech.data.manifests import durations_s, prepare_once, refuse, total_duration_s
from cald_speech.data.readers.tables import rows_of
from cald_speech.errors import UserError, some_of

logger = logging.getLogger(__name__)

OFFICIAL_COUNTS = {"train": 948, "test": 130}
# Train speakers of whom nothing is trained on, by any recipe: what is chosen, is chosen on them.
DEV_SPEAKERS = ("fclc", "fkdo", "fplp", "ftal", "mblb", "mdcs", "mjbh", "mtos")
_SAID = re.compile(r"(?:<s>)?(.*?)(?:</s>)?\s*\(([^()\s]+)\)\s*")  # test lines come without <s> and </s>
_STRANGE = re.compile(r"[^A-Z' ]")
_WAY_OUT = (
    "Get an4_sphere.tar.gz (64 MB) from http://www.speech.cs.cmu.edu/databases/an4/, unpack it and pass its folder as "
    "--data_folder."
)


class Utterance(NamedTuple):
    """One of either part; ``place`` is the file, and the line, that names it."""

    place: str
    id: str
    speaker: str
    text: str
    audio: Path


def prepare(data_folder: Path, output_folder: Path, *, share: float = 1.0) -> dict[str, Path]:
    """Write output_folder/manifests/<set>.json for train, valid (the dev speakers) and test; return {set: path}.

    With a `share` below 1 "train" is that part of its utterances, chosen by a hash of their ids, under another name:
    train-0.1.json. A tenth is part of a fifth.

    Raises: UserError, naming what is missing or cannot be used, and where the sets are not the official ones.
    """
    if not 0 < share <= 1:
        raise UserError(f"share: expected a part of the training set, above 0 and at most 1, got {share}")
    sources, parts = read_corpus(Path(data_folder).absolute())
    strangers = sorted(set(DEV_SPEAKERS) - {utterance.speaker for utterance in parts["train"]})
    refuse("an4", "the dev speakers", "without a train utterance", strangers, _WAY_OUT)
    sets = {
        "train": [utterance for utterance in parts["train"] if utterance.speaker not in DEV_SPEAKERS],
        "valid": [utterance for utterance in parts["train"] if utterance.speaker in DEV_SPEAKERS],
        "test": parts["test"],
    }
    sets["train"] = sorted(sets["train"], key=_place)[: max(1, round(share * len(sets["train"])))]
    shared = {utterance.speaker for utterance in sets["test"]} & {utterance.speaker for utterance in parts["train"]}
    refuse("an4", "train and test to share no speaker", "in both", sorted(shared), _WAY_OUT)
    manifests = {}
    for name, of_set in sets.items():
        file = f"train-{share:g}" if name == "train" and share < 1 else name
        manifests[name] = path = Path(output_folder) / "manifests" / f"{file}.json"
        audio = [utterance.audio for utterance in of_set]
        prepare_once(path, [*sources, *audio], partial(_entries, name, of_set), utterances=[u.id for u in of_set])
        speakers = len({utterance.speaker for utterance in of_set})
        hours = total_duration_s(path) / 3600
        logger.info("%s: %.3f h, %d utterances, %d speakers", name, hours, len(of_set), speakers)
    return manifests


def _place(utterance: Utterance) -> str:
    return hashlib.sha256(utterance.id.encode()).hexdigest()


def read_corpus(data_folder: Path) -> tuple[list[Path], dict[str, list[Utterance]]]:
    """The files that say what there is, and the utterances of both official parts, by their names.

    Raises: UserError, where there is no AN4, or not all of it.
    """
    places = [place for place in (data_folder, data_folder / "an4") if place.is_dir()]
    for folder in places:
        for is_there, read in ((folder / "etc", _read_sphere), (folder / "manifest.tsv", _read_table)):
            if is_there.exists():
                sources, parts = read(folder)
                for name, official in OFFICIAL_COUNTS.items():
                    found = len({utterance.id for utterance in parts[name]})
                    if not found == official == len(parts[name]):
                        raise UserError(
                            f"{folder}: expected the {official} utterances of AN4's official {name} part, each once, "
                            f"but there are {found} ({len(parts[name])} lines). {_WAY_OUT}"
                        )
                return sources, parts
    raise UserError(
        f"expected AN4 in {data_folder}, as etc/ and wav/ or as manifest.tsv, but there is neither. {_WAY_OUT}"
    )


def _read_sphere(folder: Path) -> tuple[list[Path], dict[str, list[Utterance]]]:
    sources, parts = [], {}
    for part in OFFICIAL_COUNTS:
        ids, said = (folder / "etc" / f"an4_{part}.{ending}" for ending in ("fileids", "transcription"))
        missing = [path.name for path in (ids, said) if not path.is_file()]
        if missing:
            raise UserError(f"{folder / 'etc'}: expected AN4's {part} part, without {some_of(missing)}. {_WAY_OUT}")
        sources += [ids, said]
        texts = _read_transcription(said)
        parts[part] = []
        for number, line in enumerate(read_text(ids, "AN4's file ids").splitlines(), start=1):
            if not line.strip():
                continue
            path, place = Path(line.strip()), f"{ids}:{number}"
            if path.name not in texts or len(path.parts) < 2:
                raise UserError(
                    f"{place}: expected <set>/<speaker>/<id> with a transcript of that id in {said.name}, got "
                    f"{line.strip()!r}. {_WAY_OUT}"
                )
            audio = folder / "wav" / path.with_name(f"{path.name}.sph")
            parts[part].append(Utterance(place, path.name, path.parent.name, texts[path.name], audio))
    return sources, parts


def _read_transcription(path: Path) -> dict[str, str]:
    texts = {}
    for number, line in enumerate(read_text(path, "AN4's transcripts").splitlines(), start=1):
        match = _SAID.fullmatch(line.strip())
        if line.strip() and match is None:
            raise UserError(f"{path}:{number}: expected '<s> WORDS </s> (id)', got {line.strip()!r}. {_WAY_OUT}")
        if match is not None:
            texts[match[2]] = match[1]
    return texts


def _read_table(folder: Path) -> tuple[list[Path], dict[str, list[Utterance]]]:
    table = folder / "manifest.tsv"
    parts: dict[str, list[Utterance]] = {part: [] for part in OFFICIAL_COUNTS}
    for place, row in rows_of(table):
        if not {"id", "speaker", "text", "split"} <= row.keys() or row["split"] not in parts:
            raise UserError(f"{place}: expected the columns id, speaker, text and split, train or test. {_WAY_OUT}")
        audio = folder / "flac" / f"{row['id']}.flac"
        parts[row["split"]].append(Utterance(str(place), row["id"], row["speaker"], row["text"], audio))
    return [table], parts


def _entries(name: str, utterances: Sequence[Utterance]) -> dict[str, dict]:
    texts = {utterance.id: " ".join(utterance.text.upper().split()) for utterance in utterances}
    strange = [f"{u.place} ({texts[u.id]})" for u in utterances if not texts[u.id] or _STRANGE.search(texts[u.id])]
    refuse(name, "transcripts of letters, apostrophes and spaces", "others", strange, _WAY_OUT)
    durations, faults = durations_s(utterance.audio for utterance in utterances)
    refuse(name, "readable audio for each utterance", "files that cannot be used", faults, _WAY_OUT)
    return {
        utterance.id: {
            "audio": utterance.audio,
            "duration_s": durations[utterance.audio],
            "text": texts[utterance.id],
            "speaker": utterance.speaker,
        }
        for utterance in utterances
    }
