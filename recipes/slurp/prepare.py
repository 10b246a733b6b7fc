"""SLURP (Bastianelli et al., arXiv 2011.13205) to manifests: intents, or intents and words spelt out.

<data_folder>/dataset/slurp/{train,train_synthetic,devel,test}.jsonl has one sentence a line, with its scenario, its
action and the files of its recordings, which lie in {slurp_real,slurp_synth}/, in <data_folder> or its audio/.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from cald_speech.data.audio import ends_early
from cald_speech.data.encodings import read_text
from cald_speech.data.manifests import durations_s, prepare_once, refuse, refuse_or_drop
from cald_speech.errors import UserError

logger = logging.getLogger(__name__)

# Recordings. The "intent" of a line is not always scenario_action; the two fields are what is scored.
OFFICIAL_COUNTS = {"train": 50_628, "train_synthetic": 69_253, "devel": 8_690, "test": 13_078}
FILES = {"train": ["train", "train_synthetic"], "valid": ["devel"], "test": ["test"]}
AUDIO_FOLDERS = ("slurp_real", "slurp_synth", "audio/slurp_real", "audio/slurp_synth")
_MARKED = re.compile(r"\[\s*(\w+)\s*:\s*([^\[\]]*?)\s*\]")
_WAY_OUT = (
    "The sentences are in github.com/pswietojanski/slurp, the audio (slurp_real.tar.gz, slurp_synth.tar.gz) in "
    "https://zenodo.org/record/4274930, and scripts/download_audio.sh gets it: pass the repository as --data_folder"
)


def prepare(
    data_folder: Path,
    output_folder: Path,
    *,
    synthetic: bool = True,
    joint: bool = False,
    entities: bool = False,
    drop_bad_audio: bool = False,
    sets: Sequence[str] = tuple(FILES),
) -> dict[str, Path]:
    """Write output_folder/manifests/<set>[-real][-joint].json for each of ``sets`` and return {set: that path}.

    synthetic : the synthesised half of the training set too, as in the published results; without it the name ends in
        -real. joint : texts are "SCENARIO ACTION THE SENTENCE", for CTC, and not "scenario action".
    entities : joint texts say the sentence's entities too, "... AT [TIME NINE AM]", and the name ends in -entities.
    drop_bad_audio : leave out files that are cut off or shorter than a frame, with a warning, and go on.

    Raises: UserError, naming what is missing or malformed: the folder, a file and its line, audio.
    """
    if entities and not joint:
        raise UserError("entities: expected joint: True beside it, for a class has no place for an entity's words.")
    root = Path(data_folder).absolute()
    if not (root / "dataset" / "slurp").is_dir():
        raise UserError(f"expected SLURP's sentences in {root / 'dataset' / 'slurp'}, but it is not there. {_WAY_OUT}.")
    audio = {path.name: path for folder in AUDIO_FOLDERS for path in (root / folder).glob("*.flac")}
    manifests = {}
    for name in sets:
        if name not in FILES:
            raise UserError(f"sets: expected some of {', '.join(FILES)}, got {name!r}. Correct it")
        files = [root / "dataset" / "slurp" / f"{file}.jsonl" for file in FILES[name]]
        files = [path for path in files if synthetic or path.stem != "train_synthetic"]
        recordings = {file: sentence for path in files for file, sentence in _recordings(path).items()}
        missing = [file for file in recordings if file not in audio]
        expected = f"{len(recordings)} recordings in {' and '.join(AUDIO_FOLDERS[:2])} of {root}"
        refuse(name, expected, "missing", missing, f"{_WAY_OUT}.")
        kind = "-entities" if entities else "-joint" if joint else ""
        real = "-real" if name == "train" and not synthetic else ""
        manifests[name] = Path(output_folder) / "manifests" / f"{name}{real}{kind}.json"
        chosen = {audio[file]: sentence for file, sentence in recordings.items()}
        make = partial(_entries, name, chosen, joint=joint, entities=entities, drop_bad_audio=drop_bad_audio)
        settings = {"synthetic": synthetic, "joint": joint, "drop_bad_audio": drop_bad_audio, "counts_characters": True}
        settings |= {"entities": True} if entities else {}
        prepare_once(manifests[name], [*files, *chosen], make, **settings)
    return manifests


def _recordings(path: Path) -> dict[str, dict]:
    """The sentence of each recording, by the recording's file name."""
    if not path.is_file():
        raise UserError(f"expected the sentences {path}, but there is no such file. {_WAY_OUT}.")
    found = {file: sentence for sentence in _sentences(path) for file in sentence["files"]}
    if len(found) != OFFICIAL_COUNTS[path.stem]:
        logger.warning(
            "%s lists %d recordings, but the official one has %d: figures on it do not compare with published ones.",
            *(path, len(found), OFFICIAL_COUNTS[path.stem]),
        )
    if not found:
        raise UserError(f"{path}: expected a sentence with recordings in each line, but there is none. {_WAY_OUT}.")
    return found


def _sentences(path: Path) -> Iterator[dict]:
    for number, line in enumerate(read_text(path, "SLURP's sentences").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            files = [recording["file"] for recording in row["recordings"]]
            sentence = {key: str(row[key]).strip() for key in ("slurp_id", "scenario", "action", "sentence")}
            sentence |= {"annotation": row.get("sentence_annotation"), "place": f"{path}, line {number}"}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
        else:
            words = [len(sentence[key].split()) for key in ("scenario", "action")]
            if words == [1, 1] and sentence["sentence"] and all(isinstance(file, str) for file in files):
                yield {**sentence, "files": files}
                continue
            what = f"scenario {row['scenario']!r}, action {row['action']!r}, sentence {row['sentence']!r}, {files}"
        raise UserError(
            f"{path}, line {number}: expected JSON with slurp_id, sentence, scenario and action (a word each) and "
            f'recordings [{{"file": name}}], got {what}. {_WAY_OUT}.'
        )


def _entries(
    name: str, recordings: Mapping[Path, dict], *, joint: bool, entities: bool, drop_bad_audio: bool
) -> dict[str, dict]:
    durations, faults = durations_s(recordings)
    cut_off = [path for path in durations if ends_early(path)]
    faults += [f"{path}: the audio is cut off" for path in cut_off]
    way_out = "Unpack the archive again"
    expected = "whole audio files of at least one frame"
    refuse_or_drop(name, expected, "that cannot be used", faults, way_out, drop_bad_audio=drop_bad_audio)
    entries = {}
    for path in durations.keys() - set(cut_off):
        sentence = recordings[path]
        labels = f"{sentence['scenario']} {sentence['action']}"
        words = _spell_out_entities(sentence) if entities else spell_out(sentence["sentence"])
        text = f"{labels} {words}".strip().upper() if joint else labels
        entry = {"audio": path, "duration_s": durations[path], "text": text, "slurp_id": sentence["slurp_id"]}
        # What CALD's code divides an intent's loss by.
        entry |= {} if joint else {"num_characters": len(sentence["sentence"])}
        entries[path.stem] = entry
    return entries


def _spell_out_entities(sentence: Mapping[str, str]) -> str:
    """The annotated sentence, "wake me at [time : nine am]", in the characters of joint texts and brackets."""
    annotation = sentence["annotation"]
    if not isinstance(annotation, str):
        raise UserError(
            f"{sentence['place']}: expected the sentence with its entities as sentence_annotation, such as 'wake me at "
            f"[time : nine am]', got {annotation!r}. {_WAY_OUT}."
        )
    parts = _MARKED.split(annotation)  # words, type, filler, words, ...
    spelled = [spell_out(parts[0])]
    for kind, filler, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        spelled += [f"[{kind.upper()} {spell_out(filler)}]", spell_out(after)]
    return " ".join(" ".join(spelled).split())


def spell_out(sentence: str) -> str:
    """A sentence in the characters of joint texts: letters, digits, apostrophes; others part words, as do spaces.

    The underscore is left to actions such as HUE_LIGHTOFF.

    Example
    -------
    >>> spell_out("what's u. s. d. to at&t, jack@gmail")
    "WHAT'S U S D TO AT T JACK GMAIL"
    """
    kept = (c if c.isalnum() or c == "'" else " " for c in sentence.replace("\u2019", "'").upper())
    return " ".join("".join(kept).split())
