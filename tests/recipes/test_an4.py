"""AN4: a miniature in both layouts, what is refused, its experiments, and the grid."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cald_speech import from_pretrained
from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.data.manifests import manifest_hash, read_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation.report import read_result
from cald_speech.recipes.an4 import compare
from cald_speech.recipes.an4 import prepare as recipe
from cald_speech.recipes.an4.cells import candidates, make_cells
from cald_speech.training.run import parse
from tests.data.corpora import write_sphere
from tests.recipes.start import start
from tests.training.miniature import ROOT, write_model

TRAIN_SPEAKERS = (*recipe.DEV_SPEAKERS, "fash", "fbbh")
WORDS = ("GO", "RUBOUT A B", "TWENTY SIX")


def utterances():
    """(part, folder of the part, speaker, id, text, samples)."""
    generator, number = np.random.default_rng(0), 0
    for part, folder, speakers in (("train", "an4_clstk", TRAIN_SPEAKERS), ("test", "an4test_clstk", ("fcaw", "miry"))):
        for speaker in speakers:
            for text in WORDS[: 3 if part == "train" else 2]:
                number += 1
                samples = 0.1 * generator.standard_normal(SAMPLE_RATE // 2 + 160 * number)
                yield part, folder, speaker, f"an{number}-{speaker}-b", text, samples


def write_an4(folder: Path) -> Path:
    """As CMU distributes it; transcripts of the test part come without <s> and </s>."""
    lines: dict[str, list[str]] = {}
    for part, at, speaker, key, text, samples in utterances():
        write_sphere(folder / "an4" / "wav" / at / speaker / f"{key}.sph", samples)
        said = f"<s> {text} </s> ({key})" if part == "train" else f"{text} ({key})"
        for ending, line in (("fileids", f"{at}/{speaker}/{key}"), ("transcription", said)):
            lines.setdefault(f"an4_{part}.{ending}", []).append(line)
    (folder / "an4" / "etc").mkdir()
    for name, of_file in lines.items():
        (folder / "an4" / "etc" / name).write_text("\n".join(of_file) + "\n")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_an4(tmp_path_factory.mktemp("an4"))


@pytest.fixture
def corpus(written, monkeypatch):
    monkeypatch.setattr(recipe, "OFFICIAL_COUNTS", {"train": 30, "test": 4})
    return written


def test_both_layouts_give_the_same_sets(corpus, tmp_path):
    sphere = recipe.prepare(corpus, tmp_path / "a")
    assert recipe.prepare(corpus / "an4", tmp_path / "b").keys() == sphere.keys() == {"train", "valid", "test"}
    lines = ["id\tspeaker\tseconds\ttext\tsplit"]
    (tmp_path / "flat" / "flac").mkdir(parents=True)
    for part, _, speaker, key, text, samples in utterances():
        soundfile.write(tmp_path / "flat" / "flac" / f"{key}.flac", samples, SAMPLE_RATE)
        lines.append(f"{key}\t{speaker}\t1\t{text}\t{part}")
    (tmp_path / "flat" / "manifest.tsv").write_text("\n".join(lines) + "\n")
    flat = recipe.prepare(tmp_path / "flat", tmp_path / "c")
    assert all(manifest_hash(flat[name]) == manifest_hash(sphere[name]) for name in sphere)
    sets = {name: read_manifest(path) for name, path in sphere.items()}
    speakers = {name: {entry["speaker"] for entry in of_set.values()} for name, of_set in sets.items()}
    assert speakers == {"train": {"fash", "fbbh"}, "valid": set(recipe.DEV_SPEAKERS), "test": {"fcaw", "miry"}}
    assert {entry["text"] for entry in sets["train"].values()} == set(WORDS)


def test_shares_of_the_labels(corpus, tmp_path):
    sets = {share: recipe.prepare(corpus, tmp_path, share=share) for share in (1.0, 0.5, 0.2)}
    ids = {share: set(read_manifest(of_share["train"])) for share, of_share in sets.items()}
    assert ids[0.2] < ids[0.5] < ids[1.0] and [len(ids[share]) for share in sets] == [6, 3, 1]
    assert sets[0.2]["train"].name == "train-0.2.json" and sets[0.2]["valid"] == sets[1.0]["valid"]
    with pytest.raises(UserError, match=r"share: expected a part of the training set, above 0 .* got 0"):
        recipe.prepare(corpus, tmp_path, share=0)


def drop_line(path: Path) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def shorten(folder: Path) -> None:
    write_sphere(next(folder.rglob("an1-*.sph")), np.zeros(8_000), coding="pcm,embedded-shorten-v2.00")


FAULTS = {
    "nothing": (lambda f: (f / "etc").rename(f / "other"), r"expected AN4 in .*neither.*an4_sphere\.tar\.gz"),
    "no test part": (lambda f: (f / "etc/an4_test.fileids").unlink(), r"AN4's test part, without an4_test\.fileids"),
    "too few": (lambda f: drop_line(f / "etc/an4_train.fileids"), "30 utterances of AN4's official train part.*are 29"),
    "no text": (lambda f: drop_line(f / "etc/an4_test.transcription"), r"an4_test\.fileids:1: expected .*transcript"),
    "no id": (lambda f: replace(f / "etc/an4_test.transcription", "(", ""), r"an4_test\.transcription:1: expected"),
    "no audio": (lambda f: next(f.rglob("an2-*.sph")).unlink(), "files that cannot be used: .*an2-.*no such"),
    "a digit": (lambda f: replace(f / "etc/an4_test.transcription", "GO", "4"), r"others: .*fileids:1 \(4\)"),
    "no dev": (lambda f: replace(f / "etc/an4_train.fileids", "/mtos/", "/mtoz/"), "dev speakers.*: mtos"),
    "shared": (lambda f: replace(f / "etc/an4_test.fileids", "/fcaw/", "/fash/"), "share no speaker.*: fash"),
    "shorten": (shorten, "SPHERE with shorten compression.*sph2pipe"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_named(corpus, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoilt = shutil.copytree(corpus, tmp_path / "corpus")
    spoil(spoilt / "an4")
    with pytest.raises(UserError, match=message) as caught:
        recipe.prepare(spoilt, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_the_distributed_counts(speech_of, tmp_path):
    folder = speech_of("an4")
    sets = {name: read_manifest(path) for name, path in recipe.prepare(folder, tmp_path).items()}
    assert {name: len(of_set) for name, of_set in sets.items()} == {"train": 844, "valid": 104, "test": 130}
    assert sum(len(entry["text"].split()) for entry in sets["test"].values()) == 773
    speakers = [{entry["speaker"] for entry in of_set.values()} for of_set in sets.values()]
    assert [*map(len, speakers)] == [66, 8, 10] and len(set.union(*speakers)) == 84
    assert 0.62 < sum(entry["duration_s"] for entry in sets["train"].values()) / 3600 < 0.64


@pytest.mark.slow  # two teachers and a student
def test_its_experiments_run(corpus, tmp_path):
    """Both teachers for a step; the student follows the first, with a share of the labels and then without."""
    source = write_model(tmp_path / "source", letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
    common = {"data_folder": str(corpus), "prepare_folder": str(tmp_path / "data"), "num_steps": 2, "max_batch_s": 4}
    start("an4/teacher_scratch", common | {"num_steps": 1, "output_folder": str(tmp_path / "scratch")})
    keys = {"source": source, "output_folder": str(tmp_path / "teacher"), "waypoint_every_steps": 1}
    teacher = start("an4/teacher", common | keys)
    keys = {"teacher": str(tmp_path / "teacher" / "model"), "waypoints": tmp_path / "teacher" / "waypoints"}
    keys |= {"source": source, "output_folder": str(tmp_path / "student"), "corpus": {"share": 0.5}, "alpha_task": 0.0}
    student = start("an4/student", common | keys)
    assert student.optimizer_step == teacher.optimizer_step == 2 and student.skipped.count == 0
    assert type(from_pretrained(tmp_path / "student" / "model")).__name__ == "CaldWav2Vec2ForCTC"
    assert (tmp_path / "data" / "manifests" / "train-0.5.json").is_file()
    assert read_result(tmp_path / "student" / "reports", "test").words.count == 8


@pytest.mark.wide
def test_every_cell_is_an_experiment(tmp_path):
    (tmp_path / "waypoints" / "step-0002000").mkdir(parents=True)
    for name, cell in make_cells(120).items():
        words = ["--data_folder=x", *cell.arguments(seed=3)]
        words += [f"--waypoints={tmp_path / 'waypoints'}"] if name == "waypoint" else []
        settings, _ = parse([str(ROOT / "hparams" / "an4/student.yaml"), *words])
        assert settings.seed == 3 and settings.num_steps == cell.steps, name
        assert type(settings.guidance).__name__.lower() == cell.keys["guidance"], name
        assert settings.schedule.warmup_steps + settings.schedule.decay_steps == cell.steps, name
        assert settings.prepare_folder == "results/an4/data"


def test_candidates_have_all_labels_and_equal_steps(tmp_path, monkeypatch):
    found = candidates(400)
    assert not any("steps" in name or "tenth" in name or "labels" in name for name in found)
    assert [name for name, is_global in found.items() if not is_global] == ["target, window of 16"]
    assert {"target", "hybrid", "waypoint", "target, Linformer"} < found.keys()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"AN4's teacher in results/an4/teacher.* hparams/an4/teacher\.yaml"):
        compare.main.callback(tmp_path, tmp_path, ["target"], "0", [], 400, 1)
