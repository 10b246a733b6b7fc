"""`cald-speech train`: keys go through to the experiment, and what is wrong with them is told."""

import pytest

from cald_speech.distillation import Hybrid, LossForm, Trajectory, Waypoint
from cald_speech.distillation.options import meanings
from cald_speech.training.run import train
from cald_speech.training.schedules import WarmupSchedule
from cald_speech.training.settings import Settings
from tests.training.miniature import SPLITS, write_corpus, write_experiment, write_model


def test_an_experiment_is_trained_by_its_recipe(call, tmp_path):
    write_model(tmp_path / "teacher")
    corpus = write_corpus(tmp_path / "corpus")
    yaml = write_experiment(tmp_path / "experiments" / "e.yaml", recipe="librispeech", corpus={"splits": SPLITS})
    keys = {"teacher": tmp_path / "teacher", "data_folder": corpus, "output_folder": tmp_path / "out", "num_steps": 1}
    keys |= {"max_batch_s": 5, "num_workers": 0}
    call("train", yaml, *(f"--{key}={value}" for key, value in keys.items()), "--noprogressbar")
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_help_lists_every_key_with_its_meaning_and_default(call, capsys):
    shown = call("train", "--help").stdout
    train(["hparams/mamba.yaml", "--help"])  # of a recipe's own script
    assert capsys.readouterr().out.endswith(shown[shown.index("Keys of every experiment") :])
    for cls in (Settings, WarmupSchedule, LossForm, Hybrid, Trajectory, Waypoint):
        for name, (meaning, _) in meanings(cls).items():
            assert meaning and f"--{name} " in shown.replace("\n", " "), name
    text = " ".join(shown.split())
    assert "--max_grad_norm what the gradient's norm is clipped to; .inf: never [1.0]" in text
    assert "--alpha_logits weight of the logit loss (1 for TED-LIUM, else 0) [0.0]" in text
    assert "--switch_step so many steps are guided (40,000 of 90,000 in the paper's TED-LIUM run) [no default]" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.yaml"], "error: no experiment file nowhere.yaml"),
        (["hparams/mamba.yaml", "--depth", "3"], "unknown key 'depth'"),
        (["hparams/mamba.yaml", "--recipe", "cooking"], "recipe: expected one of align, an4, asr, chapters"),
        ([], "Missing argument 'EXPERIMENT'"),
    ],
    ids=["no such file", "no such key", "no such recipe", "nothing"],
)
def test_what_is_refused(call, tmp_path, monkeypatch, words, told):
    """Shipped experiments are found from anywhere."""
    monkeypatch.chdir(tmp_path)
    assert told in call("train", *words, status=2).stderr
