"""speechocean762 to manifests whose labels are what the voice tells: gender, age, or who speaks.

Two layouts are read: OpenSLR's, <data_folder>/{train,test}/{wav.scp,text,utt2spk,spk2gender,spk2age} with the audio in
<data_folder>/WAVE; and <data_folder>[/speechocean762]/manifest.tsv (id, speaker, text, split, age, gender) beside
ogg/<id>.ogg.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cald_speech.data.encodings import read_text
from cald_speech.data.manifests import durations_s, prepare_once, refuse
from cald_speech.data.readers.tables import rows_of
from cald_speech.errors import UserError
from cald_speech.recipes.general.prepare import CORPORA

logger = logging.getLogger(__name__)

LABELS = ("gender", "age", "speaker")
OFFICIAL_COUNTS = {"train": 2500, "test": 2500}
DEV_SPEAKERS = CORPORA["speechocean762"].dev
ADULT_FROM = 15  # years; nobody is 16 to 18
# Of the 20 utterances of each speaker, in the order of a hash of their ids.
TEST_EACH, VALID_EACH = 4, 2
SPEAKER_SPLIT_SHA256 = "485c07ae7c372dfdea38233be687a9d1130dceeb1a08b4dd70811b1819fb6c94"
_GENDERS = {"m": "male", "f": "female"}
_WAY_OUT = (
    "Get speechocean762.tar.gz (520 MB) from https://www.openslr.org/101, unpack it and pass its folder as "
    "--data_folder."
)


class Utterance(NamedTuple):
    """``age`` in years, ``gender`` m or f, ``split`` of the official two."""

    id: str
    speaker: str
    split: str
    age: str
    gender: str
    audio: Path

    def label(self, kind: str) -> str:
        """What stands as the text of its entry."""
        if kind == "gender":
            return _GENDERS[self.gender]
        return self.speaker if kind == "speaker" else ("adult" if int(self.age) >= ADULT_FROM else "child")


def prepare(data_folder: Path, output_folder: Path, *, label: str = "gender") -> dict[str, Path]:
    """Write output_folder/manifests/{train,valid,test}-<label>.json and return {set: path}.

    Of "gender" and "age" (child, adult) the test set is the official one, whose speakers nobody trained on, and valid
    has five train speakers. Of "speaker" every set has all speakers: four utterances of each are tested, two choose.

    Raises: UserError, naming what is missing or cannot be used, and where the sets are not the official or the
    committed ones.
    """
    if label not in LABELS:
        raise UserError(f"label: expected one of {', '.join(LABELS)}, got {label!r}")
    sources, utterances = read_corpus(Path(data_folder).absolute())
    sets = split_within_speakers(utterances) if label == "speaker" else split_officially(utterances)
    manifests = {name: Path(output_folder) / "manifests" / f"{name}-{label}.json" for name in sets}
    for name, path in manifests.items():
        audio = [utterance.audio for utterance in sets[name]]
        ids = sorted(utterance.id for utterance in sets[name])
        prepare_once(path, [*sources, *audio], partial(_entries, name, sets[name], label), utterances=ids)
        speakers = len({utterance.speaker for utterance in sets[name]})
        logger.info("%s: %d utterances, %d speakers", path.stem, len(ids), speakers)
    return manifests


def split_officially(utterances: Sequence[Utterance]) -> dict[str, list[Utterance]]:
    """Train without the dev speakers, who are valid; test. Raises UserError where a speaker is in two parts."""
    train, test = ([u for u in utterances if u.split == part] for part in ("train", "test"))
    shared = sorted({u.speaker for u in train} & {u.speaker for u in test})
    refuse("speechocean762", "train and test to share no speaker", "in both", shared, _WAY_OUT)
    strangers = sorted(set(DEV_SPEAKERS) - {u.speaker for u in train})
    refuse("speechocean762", "the dev speakers", "without a train utterance", strangers, _WAY_OUT)
    return {
        "train": [u for u in train if u.speaker not in DEV_SPEAKERS],
        "valid": [u for u in train if u.speaker in DEV_SPEAKERS],
        "test": test,
    }


def split_within_speakers(utterances: Sequence[Utterance]) -> dict[str, list[Utterance]]:
    """Every speaker in every set. Raises UserError where the test ids are not those whose hash was committed."""
    by_speaker: dict[str, list[Utterance]] = {}
    for utterance in sorted(utterances, key=lambda u: hashlib.sha256(u.id.encode()).hexdigest()):
        by_speaker.setdefault(utterance.speaker, []).append(utterance)
    sets: dict[str, list[Utterance]] = {"train": [], "valid": [], "test": []}
    for own in by_speaker.values():
        sets["test"] += own[:TEST_EACH]
        sets["valid"] += own[TEST_EACH : TEST_EACH + VALID_EACH]
        sets["train"] += own[TEST_EACH + VALID_EACH :]
    came = hashlib.sha256("\n".join(sorted(u.id for u in sets["test"])).encode()).hexdigest()
    if came != SPEAKER_SPLIT_SHA256:
        raise UserError(
            f"expected the test utterances whose ids have the SHA-256 {SPEAKER_SPLIT_SHA256}, but it is {came}: these "
            f"are not the corpus's ids, and accuracies on others do not compare. {_WAY_OUT}"
        )
    return sets


def read_corpus(data_folder: Path) -> tuple[list[Path], list[Utterance]]:
    """The files that say what there is, and the utterances of both parts.

    Raises: UserError, where there is no speechocean762, or not all of it.
    """
    for folder in (data_folder, data_folder / "speechocean762"):
        for is_there, read in ((folder / "train" / "wav.scp", _read_openslr), (folder / "manifest.tsv", _read_table)):
            if is_there.is_file():
                sources, utterances = read(folder)
                _check(folder, utterances)
                return sources, utterances
    raise UserError(
        f"expected speechocean762 in {data_folder}, as train/ and test/ or as manifest.tsv, but there is neither. "
        f"{_WAY_OUT}"
    )


def _check(folder: Path, utterances: Sequence[Utterance]) -> None:
    for part, official in OFFICIAL_COUNTS.items():
        found = len({u.id for u in utterances if u.split == part})
        if found != official:
            raise UserError(f"{folder}: expected the {official} utterances of the {part} part, got {found}. {_WAY_OUT}")
    odd = [f"{u.id} ({u.age}, {u.gender})" for u in utterances if not u.age.isdigit() or u.gender not in _GENDERS]
    refuse(str(folder), "an age in years and m or f for each utterance", "others", odd, _WAY_OUT)


def _read_openslr(folder: Path) -> tuple[list[Path], list[Utterance]]:
    sources, utterances = [], []
    for part in OFFICIAL_COUNTS:
        files = {name: folder / part / name for name in ("wav.scp", "utt2spk", "spk2gender", "spk2age")}
        tables: dict[str, Mapping[str, str]] = {}
        for name, path in files.items():
            if not path.is_file():
                raise UserError(f"expected {path}, but it is not there. {_WAY_OUT}")
            lines = (line.split(maxsplit=1) for line in read_text(path, "a table of two columns").splitlines())
            tables[name] = {words[0]: words[-1].strip() for words in lines if words}
        sources += files.values()
        for key, audio in tables["wav.scp"].items():
            speaker = tables["utt2spk"].get(key, "")
            age, gender = (tables[name].get(speaker, "none") for name in ("spk2age", "spk2gender"))
            utterances.append(Utterance(key, speaker, part, age, gender, folder / audio))
    return sources, utterances


def _read_table(folder: Path) -> tuple[list[Path], list[Utterance]]:
    table, utterances = folder / "manifest.tsv", []
    for place, row in rows_of(table):
        missing = {"id", "speaker", "split", "age", "gender"} - row.keys()
        refuse(str(place), "the columns id, speaker, split, age and gender", "missing", sorted(missing), _WAY_OUT)
        who = (row["speaker"], row["split"], row["age"], row["gender"])
        utterances.append(Utterance(row["id"], *who, folder / "ogg" / f"{row['id']}.ogg"))
    return [table], utterances


def _entries(name: str, utterances: Sequence[Utterance], label: str) -> dict[str, dict]:
    durations, faults = durations_s(utterance.audio for utterance in utterances)
    refuse(name, "readable audio for each utterance", "files that cannot be used", faults, _WAY_OUT)
    return {
        u.id: {"audio": u.audio, "duration_s": durations[u.audio], "text": u.label(label), "speaker": u.speaker}
        for u in utterances
    }
