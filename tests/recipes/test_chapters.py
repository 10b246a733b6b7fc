"""Whole chapters: both layouts joined in order, every way of reading them, exactness, borders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.conversion import save_processor
from cald_speech.data.audio import SAMPLE_RATE, read_audio, read_entry
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.families.hub import load_processor
from cald_speech.longform.words import Word
from cald_speech.mixers import DEFAULT
from cald_speech.recipes.chapters import compare
from cald_speech.recipes.chapters import prepare as recipe
from cald_speech.recipes.chapters.borders import border_errors
from cald_speech.recipes.chapters.tables import ALONE, LONG, TEACHER, WHOLE
from cald_speech.tasks.reading import READERS
from tests.training.miniature import write_model

SAID = ("DON'T A", "BAD CAB", "A")


def utterances():
    """(id, text, samples): three of each held-out speaker, and of a stranger, not in order."""
    generator = np.random.default_rng(0)
    for speaker in (*recipe.SPEAKERS, "19"):
        for number in (2, 0, 1):
            samples = 0.1 * generator.standard_normal(SAMPLE_RATE + 160 * number)
            yield f"{speaker}-7-{number:04d}", SAID[number], samples


def write_table(folder: Path) -> Path:
    (folder / "librispeech_mini" / "ogg").mkdir(parents=True)
    lines = ["id\tspeaker\ttext"]
    for key, text, samples in utterances():
        path = folder / "librispeech_mini" / "ogg" / f"{key}.ogg"
        soundfile.write(path, samples, SAMPLE_RATE, format="OGG", subtype="OPUS")
        lines.append(f"{key}\t{key.split('-')[0]}\t{text}")
    (folder / "librispeech_mini" / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_librispeech(folder: Path) -> Path:
    for key, text, samples in utterances():
        place = folder / "LibriSpeech" / "train-clean-5" / key.split("-")[0] / "7"
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{key}.flac", samples, SAMPLE_RATE)
        with (place / f"{key.split('-')[0]}-7.trans.txt").open("a") as file:
            file.write(f"{key} {text}\n")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Teacher and student with random weights."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "teacher", letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
    model = from_pretrained(folder / "teacher", head="ctc")
    convert(model, LayerMap(DEFAULT))
    model.save_pretrained(folder / "student")
    save_processor(load_processor(folder / "teacher"), model, folder / "student")
    return folder


@pytest.mark.parametrize("layout", ["table", "LibriSpeech"])
def test_chapters_are_joined_in_the_order_of_reading(layout, corpus, tmp_path):
    data = corpus if layout == "table" else write_librispeech(tmp_path / "data")
    manifest = recipe.prepare(data, tmp_path / "out")["test"]
    chapters = recipe.chapters_of(manifest)
    assert list(chapters) == sorted(f"{speaker}-7" for speaker in recipe.SPEAKERS)
    for name, of in chapters.items():
        assert [key.split("-")[-1] for key in of] == ["0000", "0001", "0002"]
        assert [entry["text"] for entry in of.values()] == list(SAID)
        whole = read_audio(tmp_path / "out" / "audio" / f"{name}.flac")
        assert len(whole) == sum(len(read_entry(entry)) for entry in of.values()) == 3 * SAMPLE_RATE + 480
    (tmp_path / "out" / "audio" / f"{name}.flac").unlink()
    recipe.prepare(data, tmp_path / "out")
    assert (tmp_path / "out" / "audio" / f"{name}.flac").is_file()


def test_what_is_missing_is_named(corpus, tmp_path):
    with pytest.raises(UserError, match=r"expected Mini LibriSpeech in .* neither\. .*openslr\.org/31"):
        recipe.prepare(tmp_path, tmp_path / "out")
    spoilt = shutil.copytree(corpus, tmp_path / "corpus")
    table, (lost, *_) = spoilt / "librispeech_mini" / "manifest.tsv", recipe.SPEAKERS
    (spoilt / "librispeech_mini" / "ogg" / f"{lost}-7-0001.ogg").unlink()
    with pytest.raises(UserError, match=f"cannot be used: .*{lost}-7-0001.ogg"):
        recipe.prepare(spoilt, tmp_path / "out")
    table.write_text(table.read_text().replace(f"{lost}-7", "20-7"))
    with pytest.raises(UserError, match=f"the held-out speakers, but there are 1 without an utterance: {lost}"):
        recipe.prepare(spoilt, tmp_path / "out")


@pytest.mark.slow  # chapters are read
def test_the_tables(corpus, models, tmp_path, monkeypatch):
    ran = []

    def run_case(case, limit_s):
        ran.append(case["reader"])
        if case["reader"] == "chunks":
            return {"fault": "out of memory"}
        model = from_pretrained(case["model"], head="ctc")
        text = READERS[case["reader"]](model, load_processor(case["model"]))(read_audio(case["audio"]))
        return {"seconds": 2.0, "peak_bytes": 2**30, "text": text}

    monkeypatch.setattr(compare, "run_case", run_case)
    words = ["--teacher", str(models / "teacher"), "--student", str(models / "student"), "--data_folder", str(corpus)]
    words += ["--output_folder", str(tmp_path), "--window", "8", "--chapter", "2416-7", "--chapter", "6848-7"]
    done = CliRunner().invoke(compare.main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for reader, runs in (("whole", 10), ("chunks", 11)):  # what failed is tried again, nothing else
        audio = str(tmp_path / "audio" / "2416-7.flac")
        compare._read(str(models / "teacher"), reader, audio, tmp_path / "readings", 1.0)
        assert len(ran) == runs
    tables = json.loads(done.stdout.splitlines()[-1])
    rows = {row["model"]: row for row in tables["readings"]}
    assert rows["teacher, chunk and stitch"] == {"model": "teacher, chunk and stitch", "fault": "out of memory"}
    assert {TEACHER, ALONE, WHOLE, LONG, "teacher, window of 8, not trained"} < rows.keys()
    assert rows[TEACHER]["words"] == 10 and rows[TEACHER]["minus whole teacher"] == 0
    assert rows[TEACHER][f"CER to {TEACHER} %"] == 0 and rows[LONG]["WER %"] == rows[WHOLE]["WER %"]
    assert rows[LONG]["seconds"] == 4 and rows[LONG]["peak GiB"] == 1 and "seconds" not in rows[ALONE]
    assert [row["chapter"] for row in tables["chapters"]] == ["2416-7", "6848-7"]
    assert all(row["same words"] and float(row["whole - long form"]) < 1e-4 for row in tables["chapters"])
    assert [row["utterances"] for row in tables["borders"]] == [6, 6]
    assert (tmp_path / "tables.md").read_text().strip() in done.stdout
    wrong = CliRunner().invoke(compare.main, [*words, "--chapter", "19-7"])
    assert wrong.exit_code != 0 and "--chapter: expected some of 2416-7, " in wrong.output + wrong.stderr


def test_borders_are_found_where_the_words_are_put(corpus, tmp_path):
    """An aligner that puts every word on 100 ms, one second apart, from 10 ms late on."""

    class Aligner:
        def align(self, source, text, **options):
            number = len(text.split())
            late = 0.01 if number == len(all_words) else 0.0
            return [Word(word, place + late, place + late + 0.1, 1.0, ()) for place, word in enumerate(text.split())]

    of = recipe.chapters_of(recipe.prepare(corpus, tmp_path)["test"])["2416-7"]
    all_words = " ".join(entry["text"] for entry in of.values()).split()
    found = border_errors(Aligner(), of)
    starts = [entry["start_s"] for entry in read_manifest(tmp_path / "manifests" / "chapters.json").values()][:3]
    # noise from end to end is speech from end to end; of the five words 0, 2 and 4 begin an utterance
    np.testing.assert_allclose(found["start"], np.array([0.01, 2.01, 4.01]) - starts, atol=0.011)
    np.testing.assert_allclose(found["alone"][:2], 0.01, atol=1e-6)
    assert found["own"] == [1.0, 0.0, 0.0, 0.0, 0.0]
