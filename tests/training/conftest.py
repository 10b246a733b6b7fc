"""What the tests of training share: the miniature corpus, its teacher, experiments on them, and whole runs of these."""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.training.brain import CaldBrain
from cald_speech.training.run import run
from tests.training.miniature import SPLITS, write_corpus, write_experiment, write_model


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("LibriSpeech"))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """A teacher folder for each norm of the front end."""
    folder = tmp_path_factory.mktemp("teachers")
    return {norm: write_model(folder / norm, norm=norm) for norm in ("layer", "group")}


@pytest.fixture
def experiment(corpus, teachers, tmp_path) -> Callable[..., Path]:
    """Write an experiment's yaml: target guided on the miniature corpus, with the given keys on top."""
    return writer(corpus, teachers, tmp_path)


def writer(corpus: Path, teachers: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = "experiment", *, convert: bool = True, **keys) -> Path:
        defaults = {
            "output_folder": str(tmp_path / "run"),
            "data_folder": str(corpus),
            "prepare_folder": str(tmp_path / "data"),
            "corpus": {"splits": SPLITS},
            "teacher": str(teachers["layer"]),
            "guidance": "target",
            "alpha_logits": 1.0,
            "num_steps": 4,
            "max_batch_s": 4.0,
            "learning_rate": 1e-3,
            "log_every_steps": 1,
        }
        return write_experiment(tmp_path / "hparams" / f"{name}.yaml", convert=convert, **(defaults | keys))

    return write


@pytest.fixture
def start(tmp_path) -> Callable[..., CaldBrain]:
    """Run an experiment into a folder of its own, in this process; command-line words may follow."""
    return starter(tmp_path)


@dataclass
class WholeRun:
    """A run that never stopped: its Brain, and the utterances of each optimiser step, as they were trained on."""

    brain: CaldBrain
    order: dict[int, list[list[str]]]


@pytest.fixture(scope="session")
def whole(corpus, teachers, tmp_path_factory) -> Callable[..., WholeRun]:
    """Run an experiment of these keys to its end, once for all tests that stop and resume it. Change nothing of it."""
    made: dict[str, WholeRun] = {}

    def make(**keys) -> WholeRun:
        name = json.dumps(keys, sort_keys=True)
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                order = record_order(patch)
                brain = starter(folder)(writer(corpus, teachers, folder)(**keys))
            made[name] = WholeRun(brain, order)
        return made[name]

    return make


def record_order(patch: pytest.MonkeyPatch) -> dict[int, list[list[str]]]:
    """Filled with the utterances of each optimiser step while the patch lasts."""
    seen: dict[int, list[list[str]]] = {}
    fit_batch = CaldBrain.fit_batch

    def watched(brain, batch):
        seen[brain.optimizer_step] = [b.id for b in batch]
        return fit_batch(brain, batch)

    patch.setattr(CaldBrain, "fit_batch", watched)
    return seen


def starter(tmp_path: Path) -> Callable[..., CaldBrain]:
    def call(path: Path, folder: str = "run", *argv: str) -> CaldBrain:
        words = [str(path), "--output_folder", str(tmp_path / folder), "--noprogressbar", *argv]
        return run(words, prepare)

    return call


@pytest.fixture(autouse=True)
def signal_handlers():
    """A test that is stopped in the middle of training leaves no handler behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
