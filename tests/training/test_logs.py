"""Two logs of the same numbers, which a resumed run continues."""

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.training.checkpointing import StepLog
from cald_speech.training.run import run


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
