"""LibriSpeech's layout to manifests: what is there is written once, what is missing is named."""

import logging
import os
import shutil

import pytest
import soundfile
import torch

from cald_speech.data import manifests
from cald_speech.data.audio import write_audio
from cald_speech.data.manifests import manifest_hash, read_manifest
from cald_speech.errors import UserError
from cald_speech.recipes.librispeech import prepare as recipe

SPLITS = {"train": ["train-clean-100", "train-clean-360"], "valid": ["dev-clean"]}


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "data" / "LibriSpeech"
    for speaker, split in enumerate(("train-clean-100", "train-clean-360", "dev-clean"), start=1):
        chapter = root / split / str(speaker) / "9"
        for number in range(2):
            write_audio(chapter / f"{speaker}-9-{number:04d}.flac", torch.zeros(8_000 + 1_600 * number))
        (chapter / f"{speaker}-9.trans.txt").write_text(f"{speaker}-9-0000 HELLO WORLD\n{speaker}-9-0001 IT'S ME\n")
    return root


def test_manifests(corpus, tmp_path):
    manifests = recipe.prepare(corpus.parent, tmp_path / "out", SPLITS)
    assert manifests == {name: tmp_path / "out" / "manifests" / f"{name}.json" for name in SPLITS}
    entries = read_manifest(manifests["train"])
    assert list(entries) == ["1-9-0000", "1-9-0001", "2-9-0000", "2-9-0001"]
    audio = str(corpus / "train-clean-100/1/9/1-9-0001.flac")
    assert entries["1-9-0001"] == {"audio": audio, "duration_s": 0.6, "text": "IT'S ME", "speaker": "1"}
    assert os.path.isabs(audio)


def test_both_depths_of_the_folder_will_do(corpus, tmp_path):
    outer, inner = (recipe.prepare(folder, tmp_path / folder.name, SPLITS) for folder in (corpus.parent, corpus))
    assert read_manifest(outer["train"]) == read_manifest(inner["train"])


def test_work_is_done_once_for_the_same_files(corpus, tmp_path, monkeypatch):
    path = recipe.prepare(corpus, tmp_path, SPLITS)["valid"]
    before = path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "audio_info", None)
        recipe.prepare(corpus, tmp_path, SPLITS)
    assert path.stat().st_mtime_ns == before
    (corpus / "dev-clean/3/9/3-9.trans.txt").write_text("3-9-0000 NEW\n3-9-0001 TEXT\n")
    recipe.prepare(corpus, tmp_path, SPLITS)
    assert read_manifest(path)["3-9-0000"]["text"] == "NEW"


def test_an_edited_manifest_is_written_again(corpus, tmp_path):
    path = recipe.prepare(corpus, tmp_path, SPLITS)["valid"]
    good = manifest_hash(path)
    path.write_text(path.read_text().replace("HELLO", "BYE"))
    recipe.prepare(corpus, tmp_path, SPLITS)
    assert manifest_hash(path) == good


def test_part_of_an_official_split_is_a_warning(corpus, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        recipe.prepare(corpus, tmp_path, {"valid": ["dev-clean"]})
    assert "2 utterances" in caplog.text and "2703" in caplog.text


def test_other_audio_and_a_byte_order_mark(corpus, tmp_path):
    """Editors of Windows put the mark there; macOS leaves files that only look like audio."""
    chapter = corpus / "dev-clean/3/9"
    for ending, name in ((".wav", "3-9-0000"), (".ogg", "3-9-0001")):
        samples, rate = soundfile.read(chapter / f"{name}.flac")
        soundfile.write(chapter / f"{name}{ending}", samples, rate)
        (chapter / f"{name}.flac").unlink()
    (chapter / "._3-9-0000.wav").write_bytes(b"\0\5\26\7")
    table = chapter / "3-9.trans.txt"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    entries = read_manifest(recipe.prepare(corpus, tmp_path, {"valid": ["dev-clean"]})["valid"])
    assert {key: entry["text"] for key, entry in entries.items()} == {"3-9-0000": "HELLO WORLD", "3-9-0001": "IT'S ME"}


def same_names_in_two_chapters(corpus):
    shutil.copytree(corpus / "dev-clean/3/9", corpus / "dev-clean/4/8")


def lose_data(corpus):
    corpus.rename(corpus.with_name("elsewhere"))
    corpus.parent.rename(corpus.parent.with_name("moved"))


def lose_split(corpus):
    (corpus / "dev-clean").rename(corpus / "dev-other")


def lose_all_audio(corpus):
    for path in (corpus / "dev-clean").rglob("*.flac"):
        path.unlink()


def lose_transcript_file(corpus):
    (corpus / "dev-clean/3/9/3-9.trans.txt").unlink()


def lose_transcript_line(corpus):
    (corpus / "dev-clean/3/9/3-9.trans.txt").write_text("3-9-0000 HELLO WORLD\n3-9-0001\n")


def lose_audio(corpus):
    (corpus / "dev-clean/3/9/3-9-0001.flac").unlink()


def spoil_audio(corpus):
    (corpus / "dev-clean/3/9/3-9-0001.flac").write_bytes(b"spoilt")


def shorten_audio(corpus):
    write_audio(corpus / "dev-clean/3/9/3-9-0001.flac", torch.zeros(399))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (same_names_in_two_chapters, r"3-9-0000 is .*3/9/3-9-0000.flac and .*4/8/3-9-0000.flac"),
        (lose_data, r"no such folder.*openslr\.org/12.*make demo"),
        (lose_split, r"split dev-clean .*dev-other, train-clean-100.*openslr"),
        (lose_all_audio, r"dev-clean/<speaker>/<chapter>.*none"),
        (lose_transcript_file, r"2 audio files without a transcript: .*3-9-0000\.flac; .*3-9-0001\.flac"),
        (lose_transcript_line, r"1 audio files without a transcript: .*3-9-0001\.flac"),
        (lose_audio, r"1 transcripts without an audio file: 3-9-0001"),
        (spoil_audio, r"1 audio files that cannot be used: .*3-9-0001\.flac"),
        (shorten_audio, r"1 audio files that cannot be used: .*3-9-0001\.flac: 399 samples"),
    ],
)
def test_what_is_missing_is_named(corpus, tmp_path, damage, message):
    damage(corpus)
    with pytest.raises(UserError, match=message) as caught:
        recipe.prepare(corpus.parent, tmp_path / "out", SPLITS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/manifests/valid.json").exists()


def test_long_lists_are_cut():
    with pytest.raises(UserError, match="12 transcripts without audio: a0; a1; a2; a3; a4 and 7 more"):
        recipe._refuse("test", "transcripts without audio", [f"a{number}" for number in range(12)])


def test_real_slices(tmp_path, caplog, speech_of):
    real = speech_of("librispeech")
    manifests = recipe.prepare(real, tmp_path, {"test-other": ["test-other"], "test-clean": ["test-clean"]})
    assert [len(read_manifest(path)) for path in manifests.values()] == [100, 4]
    assert "2939" in caplog.text and "2620" in caplog.text
    with pytest.raises(UserError, match="24 audio files without a transcript"):
        recipe.prepare(real, tmp_path, {"train": ["train-clean-100"]})
