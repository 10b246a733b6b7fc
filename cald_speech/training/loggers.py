"""Where a run's numbers go beside ``train_log.jsonl`` and TensorBoard: Weights & Biases or MLflow, by their clients.

    logger: !new:cald_speech.training.loggers.WeightsAndBiases {project: conversions}

A logger is made with the settings. In the main process alone it begins a run before the first step, and ends it
whatever becomes of the training. A training that is taken up goes on in the run that it had there, whose name stands
in its folder.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from cald_speech.errors import UserError
from cald_speech.files import whole_file

log = logging.getLogger(__name__)


class Outcome(Enum):
    """What became of a training. One that was stopped by a signal can go on from its checkpoint."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class Logger:
    """The base of loggers. ``package`` is what it needs installed; ``_begin``, ``_write`` and ``_end`` call it."""

    package: str

    def __init__(self) -> None:
        self.begun = False
        if find_spec(self.package) is None:
            raise ImportError(
                f"logger: {type(self).__name__} needs the package {self.package}, which is not installed: pip install "
                f"{self.package}, or leave the logger out"
            )

    def begin(self, folder: Path, *, resumed: bool) -> None:
        """Begin a run; go on in that of ``folder`` where the training is taken up. Raises UserError if it cannot."""
        place = folder / f".{self.package}_run"
        known = place.read_text().strip() if resumed and place.is_file() else None
        another = f"delete {place} for a new run there, " if known else ""
        log.info("logger: %s begins its run", type(self).__name__)  # a client may try for minutes to reach its server
        with self._told("begin its run", another):
            run = self._begin(folder, known)
        self.begun = True
        with whole_file(place) as unfinished:
            unfinished.write_text(run)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one optimiser step. Raises UserError if it cannot."""
        with self._told(f"log step {step}"):
            self._write(step, dict(values))

    def end(self, outcome: Outcome) -> None:
        """Close the run, if one was begun. What was trained is kept: a failure here is told, and no more."""
        if not self.begun:
            return
        self.begun = False
        try:
            self._end(outcome)
        except Exception as error:
            log.warning("logger: %s could not close its run: %s", type(self).__name__, _line(error))

    @contextmanager
    def _told(self, what: str, also: str = "") -> Iterator[None]:
        # The clients raise errors of whatever they stand on: pydantic's, a database's, a missing package's.
        try:
            yield
        except Exception as error:
            way = f"pip install {self.package}" if isinstance(error, ImportError) else "mend that"
            raise UserError(
                f"logger: {type(self).__name__} cannot {what}: {_line(error)}. The ways out: {way}, {also}or leave the "
                "logger out; the same command goes on from the last checkpoint"
            ) from error

    def _begin(self, folder: Path, known: str | None) -> str:
        """Begin a run, or go on in the one called ``known``; returns its name there."""
        raise NotImplementedError

    def _write(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def _end(self, outcome: Outcome) -> None:
        raise NotImplementedError


class WeightsAndBiases(Logger):
    """Weights & Biases (``pip install wandb``).

    Arguments
    ---------
    project : the runs stand in it.
    options : more arguments of ``wandb.init``: entity, name, tags, mode: offline.
    """

    package = "wandb"

    def __init__(self, project: str, **options: Any):
        super().__init__()
        self.options = {"project": project, **options}

    def _begin(self, folder: Path, known: str | None) -> str:
        import wandb

        names = {"id": known or uuid4().hex, "name": folder.name}
        self.run = wandb.init(**{**names, "resume": "allow", "dir": str(folder), **self.options})
        return self.run.id

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def _end(self, outcome: Outcome) -> None:
        if outcome is Outcome.STOPPED:
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if outcome is Outcome.FINISHED else 1)


class MLflow(Logger):
    """MLflow (``pip install mlflow``; ``mlflow-skinny`` is enough for a server).

    Arguments
    ---------
    experiment : the runs stand in it.
    tracking_uri : where; default: MLflow's own.
    options : more arguments of ``mlflow.start_run``: run_name, tags.
    """

    package = "mlflow"

    def __init__(self, experiment: str, tracking_uri: str | None = None, **options: Any):
        super().__init__()
        self.experiment, self.tracking_uri, self.options = experiment, tracking_uri, options

    def _begin(self, folder: Path, known: str | None) -> str:
        import mlflow

        self.client: ModuleType = mlflow
        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_experiment(self.experiment)
        options = {"run_id": known} if known else {"run_name": folder.name, **self.options}
        return mlflow.start_run(**options).info.run_id

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.client.log_metrics(values, step=step)

    def _end(self, outcome: Outcome) -> None:
        statuses = {Outcome.FINISHED: "FINISHED", Outcome.STOPPED: "KILLED", Outcome.FAILED: "FAILED"}
        self.client.end_run(statuses[outcome])


@contextmanager
def ended(logger: Logger | None) -> Iterator[None]:
    """However the block is left, the logger's run is ended, and knows how."""
    outcome = Outcome.FAILED
    try:
        yield
        outcome = Outcome.FINISHED
    except (SystemExit, KeyboardInterrupt):
        outcome = Outcome.STOPPED
        raise
    finally:
        if logger is not None:
            logger.end(outcome)


def _line(error: Exception) -> str:
    """An error's text as a part of one paragraph."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
