"""Two logs of the same numbers, which a resumed run continues."""

import json
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cald_speech.errors import UserError
from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.training.checkpointing import StepLog
from cald_speech.training.loggers import MLflow, ended
from cald_speech.training.run import parse, run

LOGGERS = "cald_speech.training.loggers"


def lines(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def board(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("resumed_at", [0, 2, 5], ids=["from the start", "in the middle", "at the end"])
def test_each_step_once(tmp_path, resumed_at):
    first = StepLog(tmp_path, first_step=0)
    for step in range(5):
        first.write(step, {"loss": 10.0 + step})
    first.board.close()
    second = StepLog(tmp_path, first_step=resumed_at)
    for step in range(resumed_at, 7):
        second.write(step, {"loss": 20.0 + step})
    second.board.close()
    expected = [(step, (10.0 if step < resumed_at else 20.0) + step) for step in range(7)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected
    assert board(tmp_path, "loss") == expected


def test_what_is_logged(experiment, start):
    brain = start(experiment(guidance="hybrid", switch_step=2, log_every_steps=1))
    train = [line for line in lines(brain.store.folder) if "loss/task" in line]
    assert [line["step"] for line in train] == [0, 1, 2, 3]
    distances = [name for name in train[0] if name.startswith("layer_distance/")]
    assert distances == ["layer_distance/00", "layer_distance/01"]
    followed = [(line["loss/layers"] > 0, line["loss/logits"] > 0) for line in train]
    assert followed == [(True, True), (True, True), (False, False), (False, False)]
    assert train[0]["loss/layers"] == pytest.approx(sum(train[0][name] for name in distances) / 2, rel=1e-4)
    assert all(line["gradient_norm"] > 0 and line["learning_rate"] > 0 for line in train)
    for name in ("loss/task", "layer_distance/01", "learning_rate"):
        assert board(brain.store.folder, name) == [
            (line["step"], pytest.approx(line[name], rel=1e-5)) for line in train
        ]
    (valid,) = [line for line in lines(brain.store.folder) if "valid/WER" in line]
    assert valid["step"] == 3 and valid["valid/loss"] > 0


def test_log_every_steps(experiment, start):
    brain = start(experiment(log_every_steps=3, num_steps=7))
    assert [line["step"] for line in lines(brain.store.folder) if "loss/task" in line] == [0, 3, 6]


def test_progress_is_one_line_over_the_whole_run(experiment, capsys):
    """Step of steps, the time that is left, learning rate and loss; a resumed run goes on in it."""
    path = experiment(num_steps=3, checkpoint_every_steps=1)
    for steps in ("2", "3"):
        run([str(path), "--num_steps", steps], prepare)
        shown = capsys.readouterr().err.replace("\n", "\r").split("\r")
        lines = [line for line in shown if line.startswith("step ")]
        assert re.match(rf"step {steps} of {steps} \|.*\| 00:00 left, learning rate 0\.001, loss \d", lines[-1])
        assert not [line for line in shown if "it/s" in line]


@pytest.fixture
def services(monkeypatch):
    """wandb and mlflow as this package calls them; what was called, in order."""
    called = []

    def run(**options):
        called.append(("init", options))
        log = SimpleNamespace(id=options["id"], log=lambda values, step: called.append((step, values)))
        log.finish = lambda exit_code: called.append(("ended", exit_code))
        return log

    def start(**options):
        called.append(("init", options))
        return SimpleNamespace(info=SimpleNamespace(run_id="m1"))

    def log(values, step):
        if step > 3:
            raise RuntimeError("no\n route.")
        called.append((step, values))

    made = {
        "wandb": {"init": run},
        "mlflow": {"start_run": start, "log_metrics": log}
        | {
            name: lambda value, name=name: called.append((name, value))
            for name in ("set_tracking_uri", "set_experiment", "end_run")
        },
    }
    for name, parts in made.items():
        module = ModuleType(name)
        vars(module).update(parts, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    return called


def test_a_logger_gets_what_the_log_gets(experiment, start, services):
    """By the yaml; and a run that is taken up goes on in its own run there."""
    path = experiment(log_every_steps=1, num_steps=2)
    path.write_text(path.read_text() + f"logger: !new:{LOGGERS}.WeightsAndBiases {{project: p, mode: offline}}\n")
    folder = start(path).store.folder
    first = services[0][1]
    assert (first["project"], first["mode"], first["resume"]) == ("p", "offline", "allow")
    assert [step for step, _ in services[1:-1]] == [line["step"] for line in lines(folder)] == [0, 1, 1]
    assert services[-1] == ("ended", 0)
    assert services[1][1].keys() | {"step"} == lines(folder)[0].keys()
    before = len(services)
    start(path, "run", "--num_steps", "3")
    assert services[before][1]["id"] == first["id"] and services[before + 1][0] == 2


def test_mlflow(tmp_path, services):
    for resumed_at, known in ((0, {"run_name": tmp_path.name}), (2, {"run_id": "m1"})):
        log = StepLog(tmp_path, resumed_at, logger=MLflow("e", "file:/x"))
        log.write(resumed_at, {"loss/task": 1.0})
        log.board.close()
        begun = [("set_tracking_uri", "file:/x"), ("set_experiment", "e"), ("init", known)]
        assert services == [*begun, (resumed_at, {"loss/task": 1.0})]
        services.clear()
    with (
        pytest.raises(UserError, match=r"MLflow cannot log step 4: no route\. The.*goes on from the last checkpoint"),
        ended(log.logger),
    ):
        log.write(4, {"loss/task": 1.0})
    assert services == [("end_run", "FAILED")]


@pytest.mark.parametrize(
    ("logger", "told"),
    [
        (f"!new:{LOGGERS}.WeightsAndBiases {{project: p}}", "pip install wandb"),
        (f"!new:{LOGGERS}.MLflow {{experiment: p}}", "pip install mlflow"),
        ("wandb", "logger: expected `!new:cald_speech.training.loggers"),
        ("!new:wandb.init {}", "the tag !new:wandb.init is not one"),
    ],
)
def test_a_logger_that_there_is_not(experiment, monkeypatch, logger, told):
    monkeypatch.setattr("cald_speech.training.loggers.find_spec", lambda name: None)
    path = experiment()
    path.write_text(f"{path.read_text()}logger: {logger}\n")
    with pytest.raises(UserError) as error:
        parse([str(path)])
    assert told in str(error.value) and "\n" not in str(error.value)
