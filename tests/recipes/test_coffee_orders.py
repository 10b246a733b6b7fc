"""Spoken intent on a miniature of the orders: folds, a teacher, its students, and what each says."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from cald_speech.data.audio import SAMPLE_RATE, read_audio, write_audio
from cald_speech.data.manifests import manifest_hash, read_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation.labels import classify_folder, summarise
from cald_speech.recipes.coffee_orders import crossvalidate
from cald_speech.recipes.coffee_orders import prepare as recipe
from cald_speech.training.run import parse
from tests.recipes.start import start
from tests.training.miniature import ROOT, write_model

SMALL = {"num_steps": 4, "max_batch_s": 5, "log_every_steps": 1, "validate_every_epochs": 1}


def labels_of(text: str) -> list[str]:
    line = text[text.index("labels:") + len("labels:") :].split("]")[0] + "]"
    return yaml.safe_load(line.strip())


DRINKS = labels_of((ROOT / "hparams" / "coffee_orders/teacher.yaml").read_text())


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    """Thirty orders in the benchmark's layout: the drink is the pitch of a tone."""
    folder = tmp_path_factory.mktemp("orders")
    entries = {}
    for number in range(30):
        drink = number % len(DRINKS)
        slots = {"coffeeDrink": DRINKS[drink], "size": "large"} | ({"milkAmount": " skim milk"} if number % 2 else {})
        entries[f"{number}.flac"] = {"intent": "orderDrink", "slots": slots}
        tone = 0.3 * torch.sin(torch.arange(SAMPLE_RATE // 2 + 400 * number) * 0.05 * (drink + 1))
        write_audio(folder / "flac" / f"{number}.flac", tone)
    entries["tea.flac"] = {"intent": "orderTea", "slots": {}}
    (folder / "labels.json").write_text(json.dumps(entries))
    return folder


def test_every_order_is_tested_once(orders, tmp_path):
    tested = []
    for fold in range(recipe.NUM_FOLDS):
        sets = {name: read_manifest(path) for name, path in recipe.prepare(orders, tmp_path, fold=fold).items()}
        assert sum(map(len, sets.values())) == 30 and len(set().union(*sets.values())) == 30
        tested += sets["test"]
    assert sorted(tested) == sorted(str(number) for number in range(30))


def test_teacher_and_student(orders, tmp_path):
    common = SMALL | {"data_folder": str(orders), "prepare_folder": str(tmp_path / "data")}
    encoder = write_model(tmp_path / "encoder", head="base")
    teacher = start(
        "coffee_orders/teacher", common | {"source": str(encoder), "output_folder": str(tmp_path / "teacher")}
    )
    keys = {"teacher": str(teacher.store.folder / "model"), "output_folder": str(tmp_path / "student")}
    student = start(
        "coffee_orders/student", common | keys | {"guidance": "hybrid", "switch_step": 2, "alpha_logits": 1.0}
    )
    assert type(student.plain).__name__ == "CaldWav2Vec2ForSequenceClassification"
    lines = [json.loads(line) for line in (student.store.folder / "train_log.jsonl").read_text().splitlines()]
    assert lines[0]["loss/layers"] > 0 and lines[0]["loss/logits"] > 0
    manifest = tmp_path / "data" / "manifests" / "valid-0.json"
    found = classify_folder(student.store.folder / "model", manifest, tmp_path / "report.json")
    assert found.keys() == read_manifest(manifest).keys()
    assert 100 * sum(label != guess for label, guess in found.values()) / len(found) == student.progress.best_metric
    summary = summarise(found)
    assert summary["of"] == len(found) and summary["accuracy"] == pytest.approx(100 - student.progress.best_metric)


def test_labels_that_the_task_does_not_know(orders, tmp_path):
    encoder = write_model(tmp_path / "encoder", head="base")
    keys = SMALL | {"data_folder": str(orders), "source": str(encoder), "output_folder": str(tmp_path / "run")}
    keys |= {"prepare_folder": str(tmp_path / "data")}
    task = "!new:cald_speech.tasks.classification.Classification {labels: [tea, latte]}"
    with pytest.raises(UserError, match=r"train-0\.json: expected the labels tea, latte, got .* for utterance"):
        start("coffee_orders/teacher", keys | {"task": task})


def test_what_is_missing_is_named(orders, tmp_path):
    with pytest.raises(UserError, match=r"labels\.json or .*label\.json; they are not there.*git clone .*Picovoice"):
        recipe.prepare(tmp_path, tmp_path)
    with pytest.raises(UserError, match="fold: expected 0 to 4, got 5"):
        recipe.prepare(orders, tmp_path, fold=5)
    (tmp_path / "labels.json").write_text((orders / "labels.json").read_text())
    with pytest.raises(UserError, match=r"30 orders in .*, but 30 are missing, the first: "):
        recipe.prepare(tmp_path, tmp_path)


@pytest.mark.parametrize("slots", [False, True], ids=["drink", "slots"])
def test_every_fold_is_an_experiment(slots, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(crossvalidate, "train_apart", lambda *arguments: started.append(arguments))
    crossvalidate.train_fold(2, Path("x"), tmp_path, "some/encoder", slots)
    assert len(started) == len(crossvalidate.MODELS)
    for (experiment, folder, words), name in zip(started, crossvalidate.MODELS, strict=True):
        settings, _ = parse([experiment, *words])
        assert settings.output_folder == str(folder) and settings.corpus == {"fold": 2} | (
            {"slots": True} if slots else {}
        )
        assert settings.teacher == (None if name == "teacher" else str(started[0][1] / "model"))
        assert settings.source == ("some/encoder" if name == "teacher" else None)
        assert type(settings.task).__name__ == ("Intent" if slots else "Classification")


@pytest.mark.slow  # a teacher and a student
def test_slots_are_told_and_scored(orders, tmp_path):
    """A teacher and a student of all slots; what they say of the test fold becomes entities."""
    common = SMALL | {"data_folder": str(orders), "prepare_folder": str(tmp_path / "data")}
    encoder = write_model(tmp_path / "encoder", head="base")
    keys = {"source": str(encoder), "output_folder": str(tmp_path / "teacher")}
    start("coffee_orders/slots_teacher", common | keys)
    keys = {"teacher": str(tmp_path / "teacher" / "model"), "output_folder": str(tmp_path / "student")}
    student = start("coffee_orders/slots_student", common | keys)
    manifest = tmp_path / "data" / "manifests" / "test-0-slots.json"
    found = classify_folder(student.store.folder / "model", manifest, tmp_path / "report.json")
    said = {label for label, _ in found.values()}
    assert any(recipe.entities_of(text)[1:] == [("size", "large"), ("milkAmount", "skim milk")] for text in said)
    perfect = crossvalidate.entity_rows({"teacher": {key: (label, label) for key, (label, _) in found.items()}})
    assert perfect[0] | {"model": ""} == {"model": ""} | dict.fromkeys(
        ("word F1 %", "char F1 %", "SLU-F1 %", "low", "high"), 100.0
    )


def test_every_value_of_the_corpus_is_an_output(speech_of, tmp_path):
    settings, _ = parse([str(ROOT / "hparams/coffee_orders/slots_teacher.yaml"), "--data_folder=x"])
    assert tuple(settings.task.groups.groups) == recipe.SLOTS
    for path in recipe.prepare(speech_of("coffee_orders"), tmp_path, slots=True).values():
        settings.task.groups.check(path, read_manifest(path), "the task")


def test_the_benchmarks_own_layout(orders, tmp_path):
    """Where the repository was cloned: other places and wav files, the same folds."""
    (tmp_path / "data" / "label").mkdir(parents=True)
    labels = (orders / "labels.json").read_text().replace(".flac", ".wav")
    (tmp_path / "data" / "label" / "label.json").write_text(labels)
    for path in (orders / "flac").glob("*.flac"):
        write_audio(tmp_path / "data" / "speech" / "clean" / f"{path.stem}.wav", read_audio(path))
    found, wanted = (recipe.prepare(folder, tmp_path / "out" / folder.name) for folder in (tmp_path, orders))
    assert all(manifest_hash(found[name]) == manifest_hash(wanted[name]) for name in wanted)
