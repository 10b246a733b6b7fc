"""The real clients of Weights & Biases and MLflow, without a server: what they kept of a run that was stopped and
taken up. `test_logs.py` calls them by stand-ins, and so runs where they are not installed."""

import json
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from cald_speech.errors import UserError
from cald_speech.training.brain import CaldBrain
from cald_speech.training.loggers import MLflow, WeightsAndBiases

LOGGERS = "cald_speech.training.loggers"


@dataclass
class Kept:
    """What stands in a service's files: the steps and values of each name, the runs, and how the last one ended."""

    values: dict[str, list[tuple[int, float]]]
    runs: set[str]
    outcome: str


def records(path: Path):
    """The records of a ``.wandb`` file: after 7 bytes a log in LevelDB's format."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = -place % 32768 or 32768  # blocks of 32 KiB; less than a head at the end of one is padding
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def kept_by_wandb(folder: Path) -> Kept:
    from wandb.proto import wandb_internal_pb2 as proto

    values, runs, outcome = {}, set(), ""
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        outcome = "open"
        for data in records(path):
            record = proto.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.add(record.run.run_id)
            elif kind == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for name in row:
                    values.setdefault(name, []).append((row["_step"], row[name]))
            elif kind == "preempting":
                outcome = "stopped"
            elif kind == "exit" and outcome != "stopped":
                outcome = "failed" if record.exit.exit_code else "finished"
    return Kept(values, runs, outcome)


def kept_by_mlflow(folder: Path) -> Kept:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'conversions'")
    runs = client.search_runs([experiment.experiment_id])
    assert all(run.info.run_name == folder.name for run in runs)
    values = {
        name: [(m.step, m.value) for m in client.get_metric_history(runs[0].info.run_id, name)]
        for name in runs[0].data.metrics
    }
    outcome = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed", "RUNNING": "open"}[runs[0].info.status]
    return Kept(values, {run.info.run_id for run in runs}, outcome)


SERVICES = {
    "wandb": (kept_by_wandb, "WeightsAndBiases {project: conversions, mode: offline, settings: {console: 'off'}}"),
    "mlflow": (kept_by_mlflow, "MLflow {experiment: conversions, tracking_uri: 'sqlite:///%s/mlflow.db'}"),
}


@pytest.fixture
def service(request, monkeypatch, tmp_path):
    """A service's name, how its files are read, and its line in a yaml; skipped where it is not installed."""
    pytest.importorskip(request.param, reason=f"needs {request.param}, which no extra brings")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    read, line = SERVICES[request.param]
    yield read, f"logger: !new:{LOGGERS}.{line.replace('%s', str(tmp_path))}\n"
    if request.param == "mlflow":
        import mlflow

        mlflow.set_tracking_uri(None)


@pytest.mark.slow  # MLflow makes its database
@pytest.mark.parametrize("service", SERVICES, indirect=True)
def test_a_run_that_is_stopped_goes_on_in_its_run(experiment, start, monkeypatch, service):
    """And one that fails is closed as failed."""
    read, line = service
    path = experiment(num_steps=4)
    path.write_text(path.read_text() + line)
    fit_batch = CaldBrain.fit_batch

    def interrupted(brain, batch):
        if brain.optimizer_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return fit_batch(brain, batch)

    with monkeypatch.context() as patch:
        patch.setattr(CaldBrain, "fit_batch", interrupted)
        with pytest.raises(SystemExit) as left:
            start(path)
    folder = path.parent.parent / "run"
    kept = read(folder)
    assert left.value.code == 143 and kept.outcome == "stopped"
    assert [step for step, _ in kept.values["loss/task"]] == [0, 1]

    start(path)
    kept = read(folder)
    assert kept.outcome == "finished" and len(kept.runs) == 1
    logged = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    for name in ("loss/task", "layer_distance/01", "learning_rate", "valid/WER", "valid/loss"):
        here = [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in logged if name in line]
        assert here and kept.values[name] == here

    with monkeypatch.context() as patch:
        patch.setattr(CaldBrain, "on_stage_start", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(path, "run", "--num_steps", "5")
    assert read(folder).outcome == "failed"


WRONG = {
    "an option of no such name": ("wandb", lambda: WeightsAndBiases("p", mode="offline", projct="x"), "'projct'"),
    "a value that is not one": ("wandb", lambda: WeightsAndBiases("p", mode="offlin"), "'offlin'"),
    "a place of no kind": ("mlflow", lambda: MLflow("e", "nowhere://x"), "unsupported URI 'nowhere://x'"),
}


@pytest.mark.parametrize(("package", "make", "told"), WRONG.values(), ids=WRONG)
def test_what_the_client_refuses(tmp_path, package, make, told):
    """One paragraph, before the first step; nothing is remembered of a run that did not begin."""
    pytest.importorskip(package, reason=f"needs {package}, which no extra brings")
    with pytest.raises(UserError, match=r"cannot begin its run: .*leave the logger out") as error:
        make().begin(tmp_path, resumed=False)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not [*tmp_path.glob(".*_run")]
