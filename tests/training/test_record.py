"""A run says what it was, and goes on under other settings only where the command says so."""

import json

import pytest

from cald_speech.conversion.model_card import read_facts
from cald_speech.data.batching import Audio
from cald_speech.errors import UserError
from cald_speech.training.record import resolved_yaml
from cald_speech.training.run import parse
from cald_speech.training.settings import Settings
from tests.training.miniature import ROOT
from tests.training.test_resume import assert_same_run


def starts(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_folder_says_what_the_run_was_and_can_be_run_again_from_it(experiment, start):
    path = experiment(num_steps=2)
    brain = start(path, "run", "--learning_rate", "0.002")
    (entry,) = starts(brain.store.folder)
    assert entry["command"][:1] == [str(path)] and "--learning_rate" in entry["command"]
    assert entry["step"] == 0 and entry["changed"] == {} and len(entry["data"]) == 64
    assert {"cald_speech", "python", "torch", "transformers", "speechbrain"} <= entry["versions"].keys()
    written = Settings.load(brain.store.folder / "settings.yaml")
    for name in ("learning_rate", "num_steps", "weight_decay", "seed", "teacher", "guidance", "loss"):
        assert getattr(written, name) == getattr(brain.settings, name), name
    assert_same_run(start(brain.store.folder / "settings.yaml", "again"), brain)


@pytest.mark.parametrize("name", ["mamba", "digits/grid", "tedlium/student", "glue/student", "pile/student"])
def test_shipped_experiments_are_written_out_whole(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    settings, _ = parse([f"hparams/{name}.yaml", "--num_steps", "100000"])
    text = resolved_yaml(settings, ROOT / f"hparams/{name}.yaml", "num_steps: 100000")
    assert "!ref" not in text and "base:" not in text
    (tmp_path / "settings.yaml").write_text(text)
    written = Settings.load(tmp_path / "settings.yaml")
    assert written.guidance == settings.guidance and written.loss == settings.loss
    assert written.corpus == settings.corpus and written.schedule == settings.schedule


def test_other_settings_need_a_word_and_the_card_tells_the_phases(experiment, start):
    path = experiment(num_steps=2)
    folder = start(path).store.folder
    others = ["--num_steps", "4", "--learning_rate", "0.0005", "--alpha_layer=3"]
    with pytest.raises(UserError, match=r"other settings: (.*)\. Give them as they were, add --go_on") as stop:
        start(path, "run", *others)
    assert "learning_rate was 0.001 and is 0.0005" in str(stop.value)
    assert "alpha_layer was 15.0 and is 3" in str(stop.value) and "num_steps" not in str(stop.value)
    brain = start(path, "run", *others, "--go_on")
    assert brain.optimizer_step == 4 and Settings.load(folder / "settings.yaml").learning_rate == 0.0005
    assert [entry["step"] for entry in starts(folder)] == [0, 2]
    told = "from step 2: learning_rate 0.0005 (before: 0.001)"
    assert told in read_facts(folder / "model")["phases"] and told in (folder / "model/README.md").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["--log_every_steps=2", "--num_workers=1", "--checkpoint_every_steps=1", "--validate_every_epochs=2"],
        ["--waypoint_every_steps=2", "--nonfinite_patience=3", "--licence=mit", "--gradient_checkpointing=True"],
    ],
    ids=["logs", "others"],
)
def test_keys_that_change_nothing_of_what_is_learnt_are_free(experiment, start, words):
    path = experiment(num_steps=1)
    start(path)
    assert start(path, "run", *words, "--num_steps=2").optimizer_step == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--layer_map={default: {chunk_size: 8}}"], r"layer_map\.default\.chunk_size was 16 and is 8"),
        (["--model_overrides={hidden_dropout: 0.1}"], r"model_overrides\.hidden_dropout was None and is 0\.1"),
        (["--corpus={splits: {train: [dev-clean]}}"], r"corpus\.splits\.train was \['train-clean-100'\]"),
        (["--seed", "1"], "seed was 0 and is 1"),
    ],
    ids=["mixer", "dropout", "corpus", "seed"],
)
def test_what_differs_is_named(experiment, start, words, told):
    path = experiment(num_steps=1)
    start(path)
    with pytest.raises(UserError, match=told):
        start(path, "run", *words)


def test_other_data_under_the_same_settings(experiment, start, monkeypatch):
    path = experiment(num_steps=1)
    start(path)
    monkeypatch.setattr(Audio, "fingerprint", lambda self, path: "f" * 64)
    with pytest.raises(UserError, match=r"training data was [0-9a-f]{12} and is ffffffffffff"):
        start(path)
    assert start(path, "run", "--go_on", "--num_steps=2").optimizer_step == 2


def test_a_run_without_a_checkpoint_starts_anew_under_any_settings(experiment, start):
    folder = start(experiment(num_steps=1)).store.folder
    for checkpoint in (folder / "checkpoints").iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    with pytest.raises(UserError, match=r"--go_on: expected the checkpoint of a run in .*run, but there is none"):
        start(experiment(num_steps=1, learning_rate=0.002), "run", "--go_on")
    assert start(experiment(num_steps=1, learning_rate=0.002)).optimizer_step == 1
    assert len(starts(folder)) == 1
