"""A run that was stopped anywhere and started again ends with the bits of one that never stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cald_speech.training.brain import CaldBrain
from tests.training.conftest import record_order
from tests.training.miniature import ROOT

# Everything that could differ: dropout, SpecAugment, batches of changing size, accumulation.
RESTLESS = {
    "model_overrides": {"hidden_dropout": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2},
    "accumulation": 2,
    "checkpoint_every_steps": 2,
}


class Killed(Exception):
    """Stands for a power cut."""


def at_step(brain: CaldBrain, step: int) -> None:
    if brain.optimizer_step == step:
        raise Killed


def kill_after_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """Off an accumulation boundary: none of the next step is done."""
    fit_batch = CaldBrain.fit_batch

    def killed(brain, batch):
        loss = fit_batch(brain, batch)
        at_step(brain, step)
        return loss

    patch.setattr(CaldBrain, "fit_batch", killed)


def kill_inside_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """On the way through an accumulation group: the first of its batches has run backward."""
    backward = CaldBrain._backward

    def killed(brain, batch, weights, counts, *, last):
        if last:
            at_step(brain, step)
        return backward(brain, batch, weights, counts, last=last)

    patch.setattr(CaldBrain, "_backward", killed)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def train_steps(folder: Path) -> list[int]:
    return [line["step"] for line in log(folder) if "loss/task" in line]


def assert_same_state(actual, expected, where: str = "") -> None:
    """Equality to the bit, all the way down a state dict."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same_state(actual[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for place, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same_state(one, other, f"{where}/{place}")
    else:
        assert actual == expected, where


def assert_same_run(actual: CaldBrain, expected: CaldBrain) -> None:
    assert actual.optimizer_step == expected.optimizer_step
    assert_same_state(actual.plain.state_dict(), expected.plain.state_dict())
    assert_same_state(actual.optimizer.state_dict(), expected.optimizer.state_dict())
    assert actual.progress.best_metric == expected.progress.best_metric
    assert log(actual.store.folder) == log(expected.store.folder)


@pytest.fixture
def order(monkeypatch) -> dict[int, list[list[str]]]:
    return record_order(monkeypatch)


@pytest.mark.slow  # several trainings
@pytest.mark.parametrize("kill", [kill_after_step, kill_inside_step], ids=["between steps", "inside a step"])
def test_killed_in_epoch_3(experiment, start, whole, monkeypatch, order, kill):
    """Hybrid guidance: target guided where it is killed and resumed, the task loss alone at the end."""
    keys = RESTLESS | {"guidance": "hybrid", "num_steps": 19, "switch_step": 17}
    expected, path = whole(**keys), experiment(**keys)
    per_epoch = len(expected.brain.train_sampler.steps)
    step = 2 * per_epoch + per_epoch // 2  # checkpoints come at even steps of an epoch: some steps are lost
    assert per_epoch >= 3 and step < 17, "the switch and the end come after the kill"
    with monkeypatch.context() as patch:
        kill(patch, step)
        with pytest.raises(Killed):
            start(path)
    assert len(train_steps(path.parents[1] / "run")) == step
    order.clear()
    resumed = start(path)
    assert min(order) >= 2 * per_epoch, "it was taken up in epoch 3"
    assert order == {step: expected.order[step] for step in order}
    assert train_steps(resumed.store.folder) == list(range(19))
    assert_same_run(resumed, expected.brain)
    epochs = [[expected.order[epoch * per_epoch + i] for i in range(per_epoch)] for epoch in range(3)]
    assert epochs[1] != epochs[2] != epochs[0] != epochs[1]


def test_a_finished_run_trains_no_further(experiment, start, order):
    path = experiment(**RESTLESS)
    first = start(path)
    lines, weights = log(first.store.folder), (first.store.folder / "model" / "model.safetensors").read_bytes()
    order.clear()
    again = start(path)
    assert not order
    assert_same_state(again.plain.state_dict(), first.plain.state_dict())
    assert log(again.store.folder) == lines
    assert (again.store.folder / "model" / "model.safetensors").read_bytes() == weights


def test_a_finished_run_goes_on_to_more_steps(experiment, start):
    path = experiment(**RESTLESS)
    start(path, "run", "--num_steps", "4")
    longer = start(path, "run", "--num_steps", "6")
    assert longer.optimizer_step == 6 and train_steps(longer.store.folder) == list(range(6))


@pytest.mark.slow  # trainings
@pytest.mark.parametrize(
    ("number", "where"),
    [(signal.SIGTERM, "training"), (signal.SIGINT, "validation")],
    ids=["SIGTERM in training", "Ctrl-C in validation"],
)
def test_a_signal_saves_and_leaves(experiment, start, whole, monkeypatch, number, where):
    keys = RESTLESS | {"checkpoint_every_steps": 0, "num_steps": 7}
    path, expected = experiment(**keys), whole(**keys).brain
    method = {"training": "fit_batch", "validation": "evaluate_batch"}[where]
    original = getattr(CaldBrain, method)

    def interrupted(brain, *args, **kwargs):
        if brain.optimizer_step in (2, len(brain.train_sampler.steps)) and brain.interruption.signal is None:
            os.kill(os.getpid(), number)
        return original(brain, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(CaldBrain, method, interrupted)
        start(path)
    assert stopped.value.code == 128 + number
    assert len(train_steps(path.parents[1] / "run")) < 7
    assert_same_run(start(path), expected)


def test_handlers_are_put_back(experiment, start):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    start(experiment(num_steps=1))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# A recipe that waits in a step for the signal: on a machine with much to do it could end before one comes.
WAITING = """
import runpy, sys, time
from pathlib import Path
from cald_speech.training.brain import CaldBrain
sent, *sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
fit_batch = CaldBrain.fit_batch
def waiting(brain, batch):
    while brain.optimizer_step == 3 and not Path(sent).exists():
        Path(sent).with_name("waits").touch()
        time.sleep(0.01)
    return fit_batch(brain, batch)
CaldBrain.fit_batch = waiting
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow  # a Python process that trains
def test_sigterm_to_the_recipe(experiment, start, whole, tmp_path):
    keys = RESTLESS | {"num_steps": 9}
    path, expected, sent = experiment(**keys), whole(**keys).brain, tmp_path / "sent"
    command = [sys.executable, "-c", WAITING, str(sent), "recipes/librispeech/train.py", str(path)]
    command += ["--output_folder", str(tmp_path / "stopped"), "--noprogressbar"]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    with subprocess.Popen(command, **options) as process:
        while process.poll() is None and not (tmp_path / "waits").exists():
            time.sleep(0.02)
        process.terminate()
        sent.touch()
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors and "the same command goes on" in errors
    assert len(train_steps(tmp_path / "stopped")) == 4
    resumed = start(path, "stopped")
    assert train_steps(tmp_path / "stopped") == list(range(9))
    for name in ("model/model.safetensors", "model/config.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (expected.store.folder / name).read_bytes()
    assert_same_run(resumed, expected)


@pytest.mark.slow  # trainings
@pytest.mark.parametrize("last", [0, 3])
def test_joined_utterances_resume_to_the_bit(experiment, start, whole, monkeypatch, last):
    """In all steps, or in the last three alone: killed after one of these."""
    keys = RESTLESS | {"join_utterances": 3, "join_last_steps": last, "num_steps": 5}
    path, expected = experiment(**keys), whole(**keys).brain
    with monkeypatch.context() as patch:
        kill_after_step(patch, 3)
        with pytest.raises(Killed):
            start(path)
    assert_same_run(start(path), expected)
    plain = start(experiment(**RESTLESS, num_steps=1), "plain")
    same = log(plain.store.folder)[0]["loss/task"] == log(expected.store.folder)[0]["loss/task"]
    assert same == bool(last)


@pytest.mark.slow  # trainings
def test_speechbrains_augmenters_resume_to_the_bit(experiment, start, monkeypatch, corpus, tmp_path):
    """Those draw from the process's generators, and take the noises of a list in turn."""
    noises = sorted(corpus.rglob("*.flac"))[:7]  # taken up again in the middle of the list
    rows = "".join(f"{number},0.5,{path},flac,\n" for number, path in enumerate(noises))
    (tmp_path / "noise.csv").write_text(f"ID,duration,wav,wav_format,wav_opts\n{rows}")
    place = "!new:speechbrain.augment.time_domain"
    speed = f"{place}.SpeedPerturb {{orig_freq: 16000, speeds: [80, 90, 110]}}"
    noise = f"{place}.AddNoise {{csv_file: {tmp_path / 'noise.csv'}, snr_low: 0, snr_high: 10}}"
    augmented = f"!new:cald_speech.data.perturbation.SpeechBrainAugmentation {{augmenters: [{speed}, {noise}]}}"
    path = experiment(checkpoint_every_steps=2, accumulation=2, convert=False)
    words = ("--task", f"!new:cald_speech.tasks.ctc.CTC {{perturbation: {augmented}}}")
    expected = start(path, "whole", *words)
    with monkeypatch.context() as patch:
        kill_after_step(patch, 3)
        with pytest.raises(Killed):
            start(path, "run", *words)
    assert_same_run(start(path, "run", *words), expected)
