"""Where a run's numbers go beside ``train_log.jsonl`` and TensorBoard: Weights & Biases or MLflow, by their clients.

    logger: !new:cald_speech.training.loggers.WeightsAndBiases {project: conversions}

A logger is made with the settings and begins with the training, in the main process alone. A run that is taken up goes
on in the run that it had there, whose name stands in its folder.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from cald_speech.errors import UserError
from cald_speech.files import whole_file


class Logger:
    """The base of loggers. ``package`` is what it needs installed."""

    package: str

    def __init__(self) -> None:
        if find_spec(self.package) is None:
            raise ImportError(
                f"logger: {type(self).__name__} needs the package {self.package}, which is not installed: pip install "
                f"{self.package}, or leave the logger out"
            )

    def begin(self, folder: Path, *, resumed: bool) -> None:
        """Begin a run, or go on in that of ``folder``."""
        raise NotImplementedError

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one optimiser step."""
        raise NotImplementedError

    def _known(self, folder: Path, resumed: bool) -> str | None:
        path = folder / f".{self.package}_run"
        return path.read_text().strip() if resumed and path.is_file() else None

    def _remember(self, folder: Path, run: str) -> None:
        with whole_file(folder / f".{self.package}_run") as unfinished:
            unfinished.write_text(run)


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

    def begin(self, folder: Path, *, resumed: bool) -> None:
        import wandb

        known = self._known(folder, resumed) or uuid4().hex
        with _told(self, wandb.errors.Error):
            options = {"id": known, "resume": "allow", "dir": str(folder), "name": folder.name, **self.options}
            self.run = wandb.init(**options)
        self._remember(folder, options["id"])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)


class MLflow(Logger):
    """MLflow (``pip install mlflow-skinny``, or all of ``mlflow``).

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

    def begin(self, folder: Path, *, resumed: bool) -> None:
        import mlflow

        with _told(self, mlflow.exceptions.MlflowException):
            if self.tracking_uri is not None:
                mlflow.set_tracking_uri(self.tracking_uri)
            mlflow.set_experiment(self.experiment)
            known = self._known(folder, resumed)
            options = {"run_id": known} if known else {"run_name": folder.name, **self.options}
            self._remember(folder, mlflow.start_run(**options).info.run_id)
        self.client: ModuleType = mlflow

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with _told(self, self.client.exceptions.MlflowException):
            self.client.log_metrics(dict(values), step=step)


@contextmanager
def _told(logger: Logger, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise UserError(
            f"logger: {type(logger).__name__} does not answer: {error}. Mend that, or leave the logger out, and start "
            "the same command again: it goes on from the last checkpoint"
        ) from error
