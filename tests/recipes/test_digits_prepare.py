"""Connected digits: fixed test strings, clips of the right split, audio written once."""

import hashlib
import urllib.request
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import soundfile
import torch

from cald_speech.data.audio import read_audio, write_audio
from cald_speech.data.manifests import manifest_hash, read_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation.report import write_report
from cald_speech.recipes.digits import prepare as recipe
from cald_speech.recipes.digits.digit_strings import WORDS
from cald_speech.tasks.wer import score

FEW = {"num_train": 6, "num_valid": 4}


@pytest.fixture(scope="module")
def strings():
    return recipe._fixed_test_strings()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All the clips of two speakers, 30 ms each at 8 kHz: the digit is its level."""
    folder = tmp_path_factory.mktemp("fsdd")
    (folder / "recordings").mkdir()
    for digit in range(10):
        for speaker in ("george", "theo"):
            for index in range(50):
                path = folder / "recordings" / f"{digit}_{speaker}_{index}.wav"
                soundfile.write(path, torch.full((240,), (digit + 1) / 20).numpy(), 8_000)
    return folder


@pytest.fixture
def two_speakers(monkeypatch):
    """A test set of the miniature corpus in the place of the committed one."""
    strings = recipe.draw_strings("test", 5, ["george", "theo"], recipe.TEST_INDICES, 0)
    monkeypatch.setattr(recipe, "_fixed_test_strings", lambda: strings)


def indices(manifest_strings):
    return {int(clip.split("_")[2]) for string in manifest_strings.values() for clip in string.clips}


def test_committed_strings_are_the_drawn_ones(strings):
    digest = hashlib.sha256(recipe.TEST_STRINGS.read_bytes()).hexdigest()
    assert digest == recipe.TEST_STRINGS_SHA256
    drawn = recipe.draw_strings("test", 1_000, ("george", "jackson", "nicolas", "theo", "yweweler"), range(5), 20_240)
    assert drawn == strings and len(strings) == 1_000
    assert indices(strings) == set(range(5))
    assert {len(string.clips) for string in strings.values()} == {1, 2, 3, 4, 5}
    assert all(len(string.gaps_s) == len(string.clips) + 1 for string in strings.values())
    assert all(clip.split("_")[1] == string.speaker for string in strings.values() for clip in string.clips)
    assert all(0.05 <= gap <= 0.25 for string in strings.values() for gap in string.gaps_s)


def test_splits_share_no_clip():
    train, valid = (
        recipe.draw_strings("a", 2_000, ["theo"], split, 0) for split in (recipe.TRAIN_INDICES, recipe.VALID_INDICES)
    )
    assert indices(train) == set(range(5, 45)) and indices(valid) == set(range(45, 50))


def test_cued_strings():
    """The cue stands first and is written as it is; the others behind a long pause, plus one from FIVE on."""
    strings = recipe.cued_test_strings(["george", "theo"])
    assert (
        len(strings) == 300
        and indices(strings) == set(range(5))
        and strings == recipe.cued_test_strings(["george", "theo"])
    )
    assert {len(string.clips) for string in strings.values()} == {2, 3, 4}
    for string in strings.values():
        cue, *others = string.digits
        written = [WORDS.index(word) for word in string.text.split()]
        assert 5 <= string.gaps_s[1] <= 20 and all(gap <= 0.25 for gap in string.gaps_s[2:])
        assert written == [cue, *((digit + 1) % 10 if cue >= 5 else digit for digit in others)]


def test_cued_sets_and_the_words_that_a_model_reads(data, tmp_path, monkeypatch, two_speakers):
    monkeypatch.setattr(recipe, "NUM_HELD_OUT_STRINGS", 3)
    manifests = recipe.prepare(data, tmp_path / "cued", **FEW, cue_pause_s=[0.2, 0.4])
    assert len(read_manifest(manifests["test"])) == 3
    assert all(2 <= len(entry["text"].split()) <= 4 for entry in read_manifest(manifests["train"]).values())
    with pytest.raises(UserError, match=r"cue_pause_s: expected \[shortest, longest\] in seconds, got \[3, 1\]"):
        recipe.prepare(data, tmp_path / "cued", cue_pause_s=[3, 1])

    def reads(folder, manifest, report, *, split, progress):
        entries = read_manifest(manifest)
        heard = {key: "" if place == 0 else f"SIX {place}" for place, key in enumerate(sorted(entries))}
        facts = {"manifest_hash": manifest_hash(manifest), "normaliser": "none", "model": folder, "decoder": "greedy"}
        write_report(report, score({key: e["text"] for key, e in entries.items()}, heard), split=split, **facts)

    monkeypatch.setattr(recipe, "evaluate_folder", reads)
    with pytest.raises(UserError, match="transcripts_of: expected a model folder, but there is no"):
        recipe.prepare(data, tmp_path / "read", **FEW, transcripts_of=str(tmp_path / "model"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    said = recipe.prepare(data, tmp_path / "read", **FEW, transcripts_of=str(tmp_path / "model"))["train"]
    # what the model hears nothing in is left out
    assert [entry["text"] for entry in read_manifest(said).values()] == [f"SIX {place}" for place in range(1, 6)]


def test_a_changed_test_set_is_refused(monkeypatch, tmp_path, data):
    (tmp_path / "test_strings.json").write_text(recipe.TEST_STRINGS.read_text().replace("0.1", "0.2", 1))
    monkeypatch.setattr(recipe, "TEST_STRINGS", tmp_path / "test_strings.json")
    with pytest.raises(UserError, match="git checkout"):
        recipe.prepare(data, tmp_path, **FEW)
    (tmp_path / "test_strings.json").unlink()
    with pytest.raises(UserError, match="found no file"):
        recipe.prepare(data, tmp_path, **FEW)


def test_join_puts_clips_and_pauses_in_place():
    string = recipe.DigitString("theo", ("7_theo_3", "3_theo_0"), (0.1, 0.2, 0.05), noise_seed=5)
    clips = {"7_theo_3": torch.full((160,), 0.5), "3_theo_0": torch.full((320,), -0.5)}
    audio = recipe.join(string, clips.__getitem__)
    assert string.text == "SEVEN THREE"
    assert audio.dtype == torch.float32 and len(audio) == 1_600 + 160 + 3_200 + 320 + 800
    assert audio[1_600:1_760].mean() > 0.4 and audio[4_960:5_280].mean() < -0.4
    for pause in (audio[:1_600], audio[1_760:4_960], audio[5_280:]):
        assert 0.001 < pause.std() < 0.012
    assert torch.equal(audio, recipe.join(string, clips.__getitem__))


def test_audio_and_manifests_are_written_once(data, tmp_path, two_speakers):
    manifests = recipe.prepare(data, tmp_path, **FEW)
    assert {name: len(read_manifest(path)) for name, path in manifests.items()} == {"train": 6, "valid": 4, "test": 5}
    hashes = {name: manifest_hash(path) for name, path in manifests.items()}
    for entry in read_manifest(manifests["train"]).values():
        assert Path(entry["audio"]).is_relative_to(tmp_path / "audio" / "train")
        assert len(read_audio(entry["audio"])) == round(16_000 * entry["duration_s"])
        assert entry["speaker"] in ("george", "theo") and entry["text"].isupper()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    recipe.prepare(data, tmp_path, **FEW)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")} == files
    recipe.prepare(data, tmp_path, **FEW, seed=1)
    assert manifest_hash(manifests["train"]) != hashes["train"]
    assert manifest_hash(manifests["test"]) == hashes["test"]


def test_an_interrupted_run_is_taken_up_again(data, tmp_path, two_speakers, monkeypatch):
    def interrupt(path, samples):
        if path.stem == "train-00003":
            raise KeyboardInterrupt
        write_audio(path, samples)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "write_audio", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recipe.prepare(data, tmp_path, **FEW)
    assert not (tmp_path / "manifests").exists()
    assert len(read_manifest(recipe.prepare(data, tmp_path, **FEW)["train"])) == 6


def test_a_held_out_speaker_is_only_tested(data, tmp_path, two_speakers):
    manifests = recipe.prepare(data, tmp_path, **FEW, held_out_speaker="theo")
    speakers = {name: {e["speaker"] for e in read_manifest(path).values()} for name, path in manifests.items()}
    assert speakers == {"train": {"george"}, "valid": {"george"}, "test": {"george", "theo"}, "test-theo": {"theo"}}
    assert len(read_manifest(manifests["test-theo"])) == 300
    with pytest.raises(UserError, match="george, theo to hold out, but came 'lucas'"):
        recipe.prepare(data, tmp_path, **FEW, held_out_speaker="lucas")


def test_missing_data_is_named(data, tmp_path):
    with pytest.raises(UserError, match=r"recordings/<digit>_<speaker>_<index>.*Jakobovski/free-spoken-digit-dataset"):
        recipe.prepare(tmp_path / "nowhere", tmp_path, **FEW)
    with pytest.raises(UserError, match=r"the clip \d_\w+_\d in .*not there"):
        recipe.prepare(data, tmp_path, **FEW)  # the committed test set has five speakers


def archive() -> BytesIO:
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in ("recordings/3_theo_7.wav", "README.md", "recordings/../../evil.wav"):
            file.writestr(f"free-spoken-digit-dataset-master/{name}", b"sound")
    content.seek(0)
    return content


def test_download_only_unpacks_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_args, **_keywords: archive())
    recipe.download_recordings(tmp_path / "fsdd")
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["fsdd/recordings/3_theo_7.wav"]


def test_no_network_is_told(tmp_path, monkeypatch):
    def no_network(*_args, **_keywords):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=r"no route to host.*clone"):
        recipe.prepare(tmp_path / "fsdd", tmp_path, download=True)


def test_real_clips_are_all_there(strings, speech_of):
    real = speech_of("fsdd")
    clips = recipe._find_clips(real)
    assert len(clips) == 2_500
    assert {clip for string in strings.values() for clip in string.clips} <= set(clips)
    audio = recipe.join(strings["test-00000"], lambda name: recipe._load_clip(clips, real, name))
    assert 0.5 < len(audio) / 16_000 < 6
