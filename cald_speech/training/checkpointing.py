"""What a run keeps on disk, so that it goes on to the bit after any stop.

Checkpoints and model folders are whole or not there; the log is taken up at the step of the checkpoint. Beside weights,
optimiser and epoch, an exact resumption needs the random state and the progress.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from speechbrain.utils.checkpoints import (
    CKPT_PREFIX,
    Checkpoint,
    Checkpointer,
    ckpt_recency,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
    yaml,
)
from speechbrain.utils.distributed import ddp_barrier
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from cald_speech.conversion import save_processor
from cald_speech.conversion.model_card import update_facts
from cald_speech.distillation import Guidance
from cald_speech.errors import UserError
from cald_speech.files import put, sync, whole_file, whole_folder
from cald_speech.tasks.base import Processor
from cald_speech.training.distributed import gathered, is_main, rank, world_size
from cald_speech.training.guards import SkippedSteps
from cald_speech.training.loggers import Logger
from cald_speech.training.sharding import whole_state

UNFINISHED = "unfinished+"
OLD_RECONSTRUCT = "numpy.core.multiarray._reconstruct"  # its name before numpy 2
# What numpy's arrays of numbers are pickled with.
_ARRAY = np.empty(0, np.uint32)
_RECONSTRUCT = _ARRAY.__reduce__()[0]
NUMPY_ARRAYS = [np.ndarray, np.dtype, type(_ARRAY.dtype), _RECONSTRUCT, (_RECONSTRUCT, OLD_RECONSTRUCT)]
# What reading a truncated or foreign file raises, in torch, pickle and yaml.
DAMAGES = (RuntimeError, EOFError, KeyError, TypeError, ValueError, OSError, UnpicklingError, yaml.YAMLError)


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's checkpointer, writing under a temporary name that is renamed when everything is on disk.

    A run that is killed, or a disk that fills, while saving leaves the last good checkpoint as the newest one.
    """

    def __init__(self, checkpoints_dir: Path, **kwargs):
        super().__init__(checkpoints_dir, **kwargs)
        self.recovered: Checkpoint | None = None  # what the run was taken up from
        if is_main():
            # The second: of a run that was killed while it deleted one, file by file.
            strays = [p for p in self.checkpoints_dir.glob(f"{CKPT_PREFIX}+*") if not self._is_checkpoint_dir(p)]
            for left_over in [*self.checkpoints_dir.glob(f"{UNFINISHED}*"), *strays]:
                shutil.rmtree(left_over, ignore_errors=True)

    def _new_checkpoint_dirpath(self) -> Path:
        final = super()._new_checkpoint_dirpath()
        return final.with_name(UNFINISHED + final.name)

    def save_checkpoint(self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO) -> Checkpoint | None:
        """As SpeechBrain's; raises UserError, with nothing lost, if the checkpoint cannot be written."""
        try:
            saved = super().save_checkpoint(meta or {}, end_of_epoch, name, verbosity)
            final = saved and saved.path.with_name(saved.path.name.removeprefix(UNFINISHED))
            if saved is not None:
                put(saved.path, final)
        # torch's zip writer turns a full disk into a RuntimeError.
        except (OSError, RuntimeError) as error:
            for left_over in self.checkpoints_dir.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left_over)
            free = shutil.disk_usage(self.checkpoints_dir).free / 2**20
            raise UserError(
                f"cannot save a checkpoint in {self.checkpoints_dir}: {error}. The disk has {free:,.0f} MiB free. Make "
                f"room. {self.way_back()}"
            ) from error
        if saved is not None:
            saved = Checkpoint(final, saved.meta, {key: final / path.name for key, path in saved.paramfiles.items()})
        # Every rank lists the folder next, to decide what to delete: a rank that saw another list would wait for ever.
        ddp_barrier()
        return saved

    def way_back(self, *, spoilt: bool = False) -> str:
        """From where the same command goes on, for a message.

        Arguments
        ---------
        spoilt : True, where the newest checkpoint has the weights that the run could not go on with.
        """
        saved = self.find_checkpoints()
        if not saved:
            return "There is no checkpoint yet: the same command starts anew"
        newest, *older = (checkpoint.path for checkpoint in saved)
        if not spoilt:
            return f"The last good checkpoint is still there: the same command goes on from {newest}"
        before = f"delete it, to go on from {older[0]}" if older else "there is none before it: delete it to start anew"
        return f"The newest checkpoint, {newest}, has these same weights: {before}"

    def save_and_keep_only(self, *args, importance_keys=(), **kwargs) -> None:
        # SpeechBrain appends to its default list of keys, one more with each checkpoint, and then sorts by all of them.
        super().save_and_keep_only(*args, importance_keys=[*importance_keys], **kwargs)

    def delete_checkpoints(
        self, *, num_to_keep=1, min_keys=(), max_keys=(), importance_keys=(ckpt_recency,), ckpt_predicate=None, **kwargs
    ) -> None:
        """As SpeechBrain's, but each is gone at once, under a name that is swept where the run is killed."""
        orders = [{"min_key": key} for key in min_keys] + [{"max_key": key} for key in max_keys]
        listed, kept = set(), set()
        for order in orders + [{"importance_key": key} for key in importance_keys]:
            found = [c.path for c in self.find_checkpoints(ckpt_predicate=ckpt_predicate, **order)]
            listed.update(found)
            kept.update(found[:num_to_keep])
        ddp_barrier()  # every rank has listed them
        for path in listed - kept if is_main() else ():
            os.replace(path, path.with_name(UNFINISHED + path.name))
            shutil.rmtree(path.with_name(UNFINISHED + path.name), ignore_errors=True)
        ddp_barrier()

    def recover_if_possible(self, *args, **kwargs) -> Checkpoint | None:
        """As SpeechBrain's; raises UserError for a checkpoint that is truncated or of another model."""
        with self._damage_told():
            self.recovered = super().recover_if_possible(*args, **kwargs)
        return self.recovered

    def newest(self) -> Checkpoint | None:
        """The checkpoint that the run is taken up from; raises UserError as :meth:`recover_if_possible`."""
        with self._damage_told():
            return self.find_checkpoint()

    @contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except DAMAGES as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"cannot resume from the newest checkpoint in {self.checkpoints_dir}: {what} Expected one that this "
                "experiment wrote with the same model, layer map and number of processes. Delete its folder to resume "
                "from the one before, or choose another --output_folder to start anew"
            ) from error


@partial(register_checkpoint_hooks, save_on_main_only=False)
class RandomState:
    """The state of every random generator that training draws from, on every rank."""

    @mark_as_saver
    def save(self, path: Path) -> None:
        version, words, gauss = random.getstate()
        name, keys, *rest = np.random.get_state()  # SpecAugment draws its masks from numpy's global generator
        state = {
            "python": (version, torch.tensor(words), gauss),
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        states = gathered(state)
        if is_main():
            torch.save(states, path)

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        # Tensors, numbers and words alone: a checkpoint is data, and runs no code. Earlier ones have numpy's array.
        with torch.serialization.safe_globals(NUMPY_ARRAYS):
            states = torch.load(path, weights_only=True)
        if len(states) != world_size():
            raise ValueError(f"it was saved by {len(states)} processes, and this run has {world_size()}.")
        state = states[rank()]
        version, words, gauss = state["python"]
        random.setstate((version, tuple(torch.as_tensor(words).tolist()), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(keys).astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


@register_checkpoint_hooks
class Progress:
    """The guidance's state, the best figure so far, and how many steps were skipped."""

    def __init__(self, guidance: Guidance, skipped: SkippedSteps):
        self.guidance, self.skipped = guidance, skipped
        self.best_metric = float("inf")

    @mark_as_saver
    def save(self, path: Path) -> None:
        state = {"guidance": self.guidance.state_dict(), "best_metric": self.best_metric}
        torch.save(state | {"num_skipped": self.skipped.count}, path)

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        state = torch.load(path, weights_only=True)
        self.guidance.load_state_dict(state["guidance"])
        self.best_metric, self.skipped.count = state["best_metric"], state["num_skipped"]


class ModelStore:
    """Saves models under ``folder``; ``facts`` go into every model's card."""

    def __init__(self, folder: Path, processor: Processor, facts: dict[str, Any]):
        self.folder, self.processor, self.facts = folder, processor, facts

    def save(self, name: str, model: PreTrainedModel, **facts: Any) -> None:
        """Write ``folder/name``, in place of what was there, ``facts`` over the store's; the main process writes.

        All ranks have to call it for a model that is sharded.

        Raises
        ------
        UserError
            with the old folder left as it was, if the disk is full.
        """
        weights = whole_state(model)
        if not is_main():
            return
        final = self.folder / name
        try:
            with whole_folder(final) as unfinished:
                # By the names that the model has now: waypoints are read by them, without a model.
                model.save_pretrained(unfinished, state_dict=weights, save_original_format=False)
                save_processor(self.processor, model, unfinished)
                update_facts(unfinished, **self.facts | facts)
        # safetensors reports a full disk with an error of its own, which is not an OSError.
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"cannot save the model in {final}: {error}. What was there before is untouched: make room and start "
                "the same command again"
            ) from error


class StepLog:
    """Writes numbers to ``train_log.jsonl`` (one JSON object a line) and to ``tensorboard/`` in ``folder``.

    Lines at or after ``first_step``, left by a run that was killed after its last checkpoint, are dropped, and so is
    a last line that it did not finish. ``in_epoch`` says that the run is taken up inside an epoch, whose validation is
    done again even if it stands in the log as that of the step before. ``logger`` gets the same numbers.

    Raises
    ------
    UserError
        where the log cannot be written.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> log = StepLog(folder, first_step=0)
    >>> log.write(0, {"loss/task": 3.5})
    >>> (folder / "train_log.jsonl").read_text()
    '{"step": 0, "loss/task": 3.5}\\n'
    """

    def __init__(self, folder: Path, first_step: int, *, in_epoch: bool = False, logger: Logger | None = None):
        self.path = folder / "train_log.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
            known = [json.loads(line) for line in lines]
            kept = [
                line
                for line, values in zip(lines, known, strict=True)
                if values["step"] < first_step
                and not (in_epoch and values["step"] == first_step - 1 and "valid/loss" in values)
            ]
            with whole_file(self.path) as unfinished:
                unfinished.write_text("".join(kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.logger = logger
        if logger is not None:
            logger.begin(folder, resumed=first_step > 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        try:
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"step": step, **rounded}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            if self.logger is not None:
                self.logger.write(step, values)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error}. The last good checkpoint is still there: make room and start the "
                "same command again to go on from it"
            ) from error

    def settle(self) -> None:
        """Have what was logged on the disk, as what comes after it will be."""
        if self.path.exists():
            sync(self.path)
