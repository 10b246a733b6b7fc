"""Training checkpoints that are whole or not there, and the random state that an exact resumption needs."""

import logging
import os
import random
import shutil
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from speechbrain.utils.checkpoints import (
    Checkpoint,
    Checkpointer,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
    yaml,
)
from speechbrain.utils.distributed import ddp_barrier
from torch import distributed

from cald_speech.errors import UserError

UNFINISHED = "unfinished+"
# What reading a truncated or foreign file raises, in torch, pickle and yaml.
DAMAGES = (RuntimeError, EOFError, KeyError, TypeError, ValueError, OSError, UnpicklingError, yaml.YAMLError)


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's checkpointer, writing under a temporary name that is renamed when everything is on disk.

    A run that is killed, or a disk that fills, while saving leaves the last good checkpoint as the newest one.
    """

    def __init__(self, checkpoints_dir: Path, **kwargs):
        super().__init__(checkpoints_dir, **kwargs)
        if is_main():
            for left_over in self.checkpoints_dir.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left_over)

    def _new_checkpoint_dirpath(self) -> Path:
        final = super()._new_checkpoint_dirpath()
        return final.with_name(UNFINISHED + final.name)

    def save_checkpoint(self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO) -> Checkpoint | None:
        """As SpeechBrain's; raises UserError, with nothing lost, if the checkpoint cannot be written."""
        try:
            saved = super().save_checkpoint(meta or {}, end_of_epoch, name, verbosity)
        # torch's zip writer turns a full disk into a RuntimeError.
        except (OSError, RuntimeError) as error:
            for left_over in self.checkpoints_dir.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left_over)
            free = shutil.disk_usage(self.checkpoints_dir).free / 2**20
            raise UserError(
                f"cannot save a checkpoint in {self.checkpoints_dir}: {error}. The disk has {free:,.0f} MiB free. The "
                "last good checkpoint is still there: make room and start the same command again to go on from it"
            ) from error
        if saved is not None:
            final = saved.path.with_name(saved.path.name.removeprefix(UNFINISHED))
            os.replace(saved.path, final)
            saved = Checkpoint(final, saved.meta, {key: final / path.name for key, path in saved.paramfiles.items()})
        # Every rank lists the folder next, to decide what to delete: a rank that saw another list would wait for ever.
        ddp_barrier()
        return saved

    def save_and_keep_only(self, *args, importance_keys=(), **kwargs) -> None:
        # SpeechBrain appends to its default list of keys, one more with each checkpoint, and then sorts by all of them.
        super().save_and_keep_only(*args, importance_keys=[*importance_keys], **kwargs)

    def recover_if_possible(self, *args, **kwargs) -> Checkpoint | None:
        """As SpeechBrain's; raises UserError for a checkpoint that is truncated or of another model."""
        try:
            return super().recover_if_possible(*args, **kwargs)
        except DAMAGES as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"cannot resume from the newest checkpoint in {self.checkpoints_dir}: {what} Expected one that this "
                "experiment wrote with the same model, layer map and number of processes. Delete its folder to resume "
                "from the one before, or choose another --output_folder to start anew"
            ) from error


def is_main() -> bool:
    """Whether this process writes: the only one, or rank 0."""
    return int(os.environ.get("RANK", 0)) == 0


@partial(register_checkpoint_hooks, save_on_main_only=False)
class RandomState:
    """The state of every random generator that training draws from, on every rank."""

    @mark_as_saver
    def save(self, path: Path) -> None:
        state = {
            "python": random.getstate(),
            # SpecAugment draws its masks from numpy's global generator.
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        states = [state]
        if distributed.is_initialized():
            states = [None] * distributed.get_world_size()
            distributed.all_gather_object(states, state)
        if is_main():
            torch.save(states, path)

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        states = torch.load(path, weights_only=False)  # our own file: python's and numpy's states are tuples
        rank, world_size = 0, 1
        if distributed.is_initialized():
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
        if len(states) != world_size:
            raise ValueError(f"it was saved by {len(states)} processes, and this run has {world_size}.")
        random.setstate(states[rank]["python"])
        np.random.set_state(states[rank]["numpy"])
        torch.set_rng_state(states[rank]["torch"])
        if states[rank]["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[rank]["cuda"])
