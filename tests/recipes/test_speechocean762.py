"""speechocean762: a miniature in both layouts, both splits, what is refused, and its experiments."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cald_speech import recipes
from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.recipes import Spent
from cald_speech.recipes.paired_labels import label_rows
from cald_speech.recipes.speechocean762 import compare
from cald_speech.recipes.speechocean762 import prepare as recipe
from cald_speech.training.run import parse
from tests.recipes.start import start
from tests.training.miniature import write_model

# (age, gender) of each speaker
TRAIN = dict.fromkeys(recipe.DEV_SPEAKERS, ("9", "f")) | {"0001": ("6", "m"), "0002": ("21", "f")}
TEST = {"0003": ("7", "f"), "0004": ("15", "m")}
EACH = 7


def utterances():
    """(part, id, speaker, samples)."""
    generator, number = np.random.default_rng(0), 0
    for part, speakers in (("train", TRAIN), ("test", TEST)):
        for speaker in speakers:
            for place in range(EACH):
                number += 1
                yield part, f"{speaker}{place}", speaker, 0.1 * generator.standard_normal(8_000 + 160 * number)


def write_openslr(folder: Path) -> Path:
    lines: dict[str, list[str]] = {}
    for part, key, speaker, samples in utterances():
        audio = folder / "WAVE" / f"SPEAKER{speaker}" / f"{key}.WAV"
        audio.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(audio, samples, SAMPLE_RATE)
        lines.setdefault(f"{part}/wav.scp", []).append(f"{key}\tWAVE/SPEAKER{speaker}/{key}.WAV")
        lines.setdefault(f"{part}/utt2spk", []).append(f"{key}\t{speaker}")
    for part, speakers in (("train", TRAIN), ("test", TEST)):
        lines[f"{part}/spk2age"] = [f"{speaker}\t{age}" for speaker, (age, _) in speakers.items()]
        lines[f"{part}/spk2gender"] = [f"{speaker}\t{gender}" for speaker, (_, gender) in speakers.items()]
    for name, of_file in lines.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(of_file) + "\n")
    return folder


def write_table(folder: Path) -> Path:
    (folder / "ogg").mkdir(parents=True)
    lines = ["id\tspeaker\tseconds\ttext\tsplit\tage\tgender"]
    for part, key, speaker, samples in utterances():
        soundfile.write(folder / "ogg" / f"{key}.ogg", samples, SAMPLE_RATE, format="OGG", subtype="OPUS")
        lines.append("\t".join([key, speaker, "1", "A", part, *(TRAIN | TEST)[speaker]]))
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_openslr(tmp_path_factory.mktemp("speechocean762"))


@pytest.fixture
def corpus(written, monkeypatch):
    monkeypatch.setattr(recipe, "OFFICIAL_COUNTS", {"train": 7 * EACH, "test": 2 * EACH})
    monkeypatch.setattr(recipe, "SPEAKER_SPLIT_SHA256", "7e7")
    return written


def labels_of(manifest: Path) -> dict[str, str]:
    return {key: entry["text"] for key, entry in read_manifest(manifest).items()}


def test_both_layouts_have_the_same_labels(corpus, tmp_path):
    flat = write_table(tmp_path / "flat")
    for label, said in (("gender", {"female", "male"}), ("age", {"child", "adult"})):
        found = recipe.prepare(corpus, tmp_path / "a", label=label)
        other = recipe.prepare(flat, tmp_path / "b", label=label)
        assert all(labels_of(found[name]) == labels_of(other[name]) for name in ("train", "valid", "test"))
        assert set(labels_of(found["train"]).values()) == set(labels_of(found["test"]).values()) == said
        speakers = [{entry["speaker"] for entry in read_manifest(path).values()} for path in found.values()]
        assert speakers == [{"0001", "0002"}, set(recipe.DEV_SPEAKERS), set(TEST)]
    assert labels_of(found["test"])["00040"] == "adult" and labels_of(found["test"])["00030"] == "child"


def test_speakers_are_split_within(corpus, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ids have the SHA-256 7e7, but it is (\w{64}): these"):
        recipe.prepare(corpus, tmp_path, label="speaker")
    ids = []
    monkeypatch.setattr(recipe, "SPEAKER_SPLIT_SHA256", _hash_of(corpus))
    for name, path in recipe.prepare(corpus, tmp_path, label="speaker").items():
        found = read_manifest(path)
        each = {"train": 1, "valid": 2, "test": 4}[name]
        assert len(found) == each * 9 and {entry["text"] for entry in found.values()} == {*TRAIN, *TEST}
        ids += found
    assert len(ids) == len(set(ids)) == 9 * EACH


def _hash_of(corpus: Path) -> str:
    try:
        recipe.split_within_speakers(recipe.read_corpus(corpus)[1])
    except UserError as error:
        return str(error).split("it is ")[1][:64]
    raise AssertionError("expected a refusal")


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


FAULTS = {
    "nothing": (lambda f: shutil.rmtree(f / "train"), r"expected speechocean762 in .* neither\. .*openslr\.org/101"),
    "no table": (lambda f: (f / "test/spk2age").unlink(), "expected .*test/spk2age, but it is not there"),
    "too few": (lambda f: replace(f / "test/wav.scp", "00030\t", "00031\t"), "14 utterances of the test part, got 13"),
    "no age": (lambda f: replace(f / "test/spk2age", "0004\t15", "0004\told"), r"an age in years.*00040 \(old, m\)"),
    "shared": (lambda f: _rename(f, "0003", "0001"), "share no speaker.*: 0001"),
    "no dev": (lambda f: _rename(f, recipe.DEV_SPEAKERS[0], "0001"), f"dev speakers.*: {recipe.DEV_SPEAKERS[0]}"),
    "no audio": (lambda f: next(f.rglob("00010.WAV")).unlink(), r"cannot be used: .*00010\.WAV"),
}  # fmt: skip


def _rename(folder: Path, old: str, new: str) -> None:
    for part in ("train", "test"):
        replace(folder / part / "utt2spk", f"\t{old}\n", f"\t{new}\n")
        with (folder / part / "spk2age").open("a") as age, (folder / part / "spk2gender").open("a") as gender:
            age.write(f"{new}\t9\n")
            gender.write(f"{new}\tf\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_named(corpus, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoilt = shutil.copytree(corpus, tmp_path / "corpus")
    spoil(spoilt)
    with pytest.raises(UserError, match=message) as caught:
        recipe.prepare(spoilt, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_the_distributed_corpus(speech_of):
    """Counts alone: all audio is looked at by `make test-all`, with the general recipe."""
    _, found = recipe.read_corpus(speech_of("speechocean762"))
    official, within = recipe.split_officially(found), recipe.split_within_speakers(found)
    assert {name: len(of_set) for name, of_set in official.items()} == {"train": 2400, "valid": 100, "test": 2500}
    assert {name: len(of_set) for name, of_set in within.items()} == {"train": 3500, "valid": 500, "test": 1000}
    assert [len({u.speaker for u in of_set}) for of_set in (*official.values(), *within.values())] == [
        *(120, 5, 125),
        *(250, 250, 250),
    ]


def test_teacher_and_student(corpus, tmp_path):
    keys = {"data_folder": str(corpus), "prepare_folder": str(tmp_path / "data"), "num_steps": 2, "max_batch_s": 4}
    encoder = write_model(tmp_path / "encoder", head="base")
    teacher = {"source": str(encoder), "output_folder": str(tmp_path / "teacher"), "label": "age"}
    start("speechocean762/teacher", keys | teacher)
    student = {"teacher": str(tmp_path / "teacher" / "model"), "output_folder": str(tmp_path / "student")}
    brain = start("speechocean762/student", keys | student | {"label": "age"})
    assert brain.optimizer_step == 2 and type(brain.plain).__name__ == "CaldWav2Vec2ForSequenceClassification"
    assert set(brain.plain.config.id2label.values()) == {"adult", "child"}


def test_every_run_is_an_experiment(tmp_path, monkeypatch):
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "train_apart", lambda *arguments: started.append(arguments) or Spent(1.0, 1.0))
    for mode, seed in ((None, 0), ("unguided", 2), ("unguided", 2)):
        compare.train_one(Path("x"), "speaker", mode, seed)
    assert len(started) == 2  # what has ended is not trained again
    for (experiment, folder, words), seed in zip(started, (0, 2), strict=True):
        settings, _ = parse([experiment, *words])
        assert settings.output_folder == str(folder) and settings.corpus == {"label": "speaker"}
        assert settings.seed == seed and settings.teacher in (None, "results/speechocean762/speaker-teacher/model")


def test_seeds_are_compared_with_one_teacher():
    teacher = dict.fromkeys("abcd", ("x", "x")) | {"e": ("y", "x")}
    seeds = [teacher | {"e": ("y", "y")}, teacher | {"a": ("x", "y")}]
    majority, first, row = label_rows(
        {"teacher": [teacher], "target": seeds}, drawn_by=dict.fromkeys("abcd", 0) | {"e": 1}
    )
    assert majority["model"] == "majority class (x)" and majority["right"] == 4 and first["minus teacher"] == 0
    assert (row["right"], row["of"], row["it alone"], row["teacher alone"]) == (8, 10, 1, 1)
    assert row["seeds"] == "100.00 60.00" and row["accuracy %"] == 80 and row["low"] <= 80 <= row["high"]
