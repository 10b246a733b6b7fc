"""Connected digits from the Free Spoken Digit Dataset: clips joined to strings of 1 to 5 digits, and their manifests.

Train and valid strings are drawn anew from clips 5 to 44 and 45 to 49 of each speaker and digit; the 1,000 test strings
are fixed in test_strings.json (clips 0 to 4, the data set's own test clips). The transcript is the digit words.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch

from cald_speech.data.audio import SAMPLE_RATE, read_audio, write_audio
from cald_speech.data.manifests import Entry, manifest_hash, prepare_once, read_manifest, write_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.evaluation.report import read_result
from cald_speech.files import once, settle, sweep, whole_file
from cald_speech.recipes.digits.digit_strings import (
    TEST_INDICES,
    TRAIN_INDICES,
    VALID_INDICES,
    DigitString,
    draw_strings,
    join,
    read_strings,
)
from cald_speech.recipes.digits.download import REPOSITORY, download_recordings

TEST_STRINGS = Path(__file__).with_name("test_strings.json")
TEST_STRINGS_SHA256 = "315dfc94f2ec3044c03d8cabaf8f3fac9e3ade454372ed2f0cd128842d4a01de"
NUM_HELD_OUT_STRINGS = 300
_RECIPE_VERSION = 2  # raise it where the same strings would sound different
_WAY_OUT = f"Get it with python recipes/digits/download.py, or clone {REPOSITORY}: its folder is the --data_folder."


def prepare(
    data_folder: Path,
    output_folder: Path,
    *,
    num_train: int = 8_000,
    num_valid: int = 200,
    held_out_speaker: str | None = None,
    label: str = "text",
    cue_pause_s: tuple[float, float] | None = None,
    transcripts_of: str | None = None,
    seed: int = 0,
    download: bool = False,
) -> dict[str, Path]:
    """Join the clips in data_folder/recordings; return {"train", "valid", "test": manifest}, written once.

    With `held_out_speaker`, train and valid do without that speaker, and "test-<speaker>" has 300 strings of all of the
    speaker's clips; "test" stays the same 1,000 strings of everybody. `label` is what stands as an entry's text: the
    digit words ("text") or the "speaker". `seed` draws the train and valid strings.

    With `cue_pause_s`, (shortest, longest), all strings are cued ones with such a pause behind the cue; the 300 test
    strings have 5 to 20 s whatever is given. With `transcripts_of`, a model folder, "train" has the words that this
    model reads in the place of what was said.

    Raises: UserError, where the data set or clips of it are missing, the speaker is unknown, or test_strings.json is
    not the committed one.
    """
    data_folder, output_folder = Path(data_folder).absolute(), Path(output_folder)
    if label not in ("text", "speaker"):
        raise UserError(f"label: expected text or speaker, but came {label!r}.")
    if download and not (data_folder / "recordings").is_dir():
        download_recordings(data_folder)
    clips = _find_clips(data_folder)
    everybody = speakers_of(data_folder)
    if held_out_speaker is not None and held_out_speaker not in everybody:
        raise UserError(
            f"expected one of the speakers {', '.join(everybody)} to hold out, but came {held_out_speaker!r}."
        )
    speakers = [speaker for speaker in everybody if speaker != held_out_speaker]
    draw = partial(draw_strings, cue_pause_s=None if cue_pause_s is None else _pause(cue_pause_s))
    sets = {
        "train": draw("train", num_train, speakers, TRAIN_INDICES, seed),
        "valid": draw("valid", num_valid, speakers, VALID_INDICES, seed),
        "test": test_strings() if cue_pause_s is None else cued_test_strings(everybody),
    }
    if held_out_speaker is not None and cue_pause_s is None:
        sets[f"test-{held_out_speaker}"] = test_strings(held_out_speaker)
    load = cache(partial(_load_clip, clips, data_folder))
    manifests = {
        name: _materialise(
            name, strings, data_folder, output_folder, partial(join, load=load, perturb=name == "train"), label
        )
        for name, strings in sets.items()
    }
    if transcripts_of is not None:
        manifests["train"] = _as_read_by(transcripts_of, manifests["train"])
    return manifests


def _pause(given: Sequence[float]) -> tuple[float, float]:
    if len(given) != 2 or not 0 < given[0] <= given[1]:
        raise UserError(f"cue_pause_s: expected [shortest, longest] in seconds, got {given!r}")
    return given[0], given[1]


def _as_read_by(folder: str, manifest: Path) -> Path:
    """The manifest with the words that a model reads, beside it; made anew where the model or the set changed."""
    heard, weights = manifest.with_stem(f"{manifest.stem}-as-read"), Path(folder) / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"transcripts_of: expected a model folder, but there is no {weights}. Train it, or correct it")

    def make() -> dict[str, Entry]:
        entries, report = read_manifest(manifest), heard.with_suffix("")
        evaluate_folder(folder, manifest, report, split=heard.stem, progress=False)
        read = {utterance.id: utterance.hypothesis for utterance in read_result(report, heard.stem).utterances}
        return {key: entry | {"text": read[key]} for key, entry in entries.items() if read[key]}

    prepare_once(heard, [manifest, weights], make)
    return heard


def speakers_of(data_folder: Path) -> list[str]:
    """The speakers of a data folder, sorted."""
    return sorted({name.split("_")[1] for name in _find_clips(Path(data_folder))})


def _find_clips(data_folder: Path) -> dict[str, Path]:
    folder = data_folder / "recordings"
    clips = {path.stem: path for path in sorted(folder.glob("?_*_*.*")) if path.suffix in (".wav", ".flac")}
    if not clips:
        raise UserError(
            f"expected the Free Spoken Digit Dataset as {folder}/<digit>_<speaker>_<index>.wav (or .flac), but there "
            f"is nothing of the kind. {_WAY_OUT}"
        )
    return clips


def test_strings(held_out_speaker: str | None = None) -> dict[str, DigitString]:
    """The fixed test strings, or those of a speaker nobody trained on: of all of the speaker's clips."""
    if held_out_speaker is not None:
        name, indices = f"test-{held_out_speaker}", range(TEST_INDICES[0], VALID_INDICES[-1] + 1)
        return draw_strings(name, NUM_HELD_OUT_STRINGS, [held_out_speaker], indices, seed=0)
    return _fixed_test_strings()


def cued_test_strings(speakers: Sequence[str]) -> dict[str, DigitString]:
    """300 strings of the data set's own test clips, the digits 5 to 20 s behind the cue."""
    return draw_strings("test", NUM_HELD_OUT_STRINGS, speakers, TEST_INDICES, 0, cue_pause_s=(5.0, 20.0))


def _fixed_test_strings() -> dict[str, DigitString]:
    came = hashlib.sha256(TEST_STRINGS.read_bytes()).hexdigest() if TEST_STRINGS.is_file() else "no file"
    if came != TEST_STRINGS_SHA256:
        raise UserError(
            f"expected the fixed test set in {TEST_STRINGS}, with the SHA-256 {TEST_STRINGS_SHA256}, but found {came}. "
            f"Error rates on other strings do not compare: restore the file with git checkout."
        )
    return read_strings(TEST_STRINGS)


def _load_clip(clips: Mapping[str, Path], data_folder: Path, name: str) -> torch.Tensor:
    if name not in clips:
        raise UserError(f"expected the clip {name} in {data_folder / 'recordings'}, but it is not there. {_WAY_OUT}")
    return read_audio(clips[name])


def _materialise(
    name: str,
    strings: Mapping[str, DigitString],
    data_folder: Path,
    output_folder: Path,
    render: Callable[[DigitString], torch.Tensor],
    label: str,
) -> Path:
    """Write the audio and the manifest of one set, unless the record in the audio folder says they are there."""
    folder, manifest = (output_folder / "audio" / name).absolute(), output_folder / "manifests" / f"{name}.json"
    record = folder / ".done"
    content = json.dumps([_RECIPE_VERSION, str(data_folder), {key: asdict(string) for key, string in strings.items()}])
    content += "" if label == "text" else label
    wanted = hashlib.sha256(content.encode()).hexdigest()

    def is_made() -> bool:
        return record.is_file() and manifest.is_file() and record.read_text() == wanted + manifest_hash(manifest)

    def write() -> None:
        sweep(folder)
        record.unlink(missing_ok=True)
        entries = {}
        for key, string in strings.items():
            samples, path = render(string), folder / f"{key}.flac"
            write_audio(path, samples)
            said = {"text": getattr(string, label), "speaker": string.speaker}
            entries[key] = {"audio": path, "duration_s": len(samples) / SAMPLE_RATE, **said}
        write_manifest(manifest, entries)
        settle()
        with whole_file(record) as unfinished:
            unfinished.write_text(wanted + manifest_hash(manifest))

    once(folder, "done", is_made, write)
    return manifest
