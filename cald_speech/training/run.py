"""`train()`, the body of every recipe: settings, data, models, Brain."""

import errno
import inspect
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from speechbrain.utils.distributed import ddp_barrier
from speechbrain.utils.run_opts import RunOptions
from torch.utils.data import DataLoader

import cald_speech
from cald_speech.conversion.model_card import base_model_of
from cald_speech.data.batching import Audio, StepSampler, batch_loader, step_loader
from cald_speech.errors import UserError, error_epilogue
from cald_speech.files import InUse, locked, sweep
from cald_speech.shipped import experiment_file, recipes_folder
from cald_speech.tasks.base import Processor
from cald_speech.training import command_line, distributed
from cald_speech.training.brain import CaldBrain
from cald_speech.training.checkpointing import AtomicCheckpointer, ModelStore
from cald_speech.training.models import Models, build_models, put_on_adapters
from cald_speech.training.record import RunRecord, resolved_yaml
from cald_speech.training.scoring import LEARNT_FROM, score_test_sets
from cald_speech.training.settings import Settings
from cald_speech.training.unread import idle_keys

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
CLOSED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)

Prepare = Callable[..., Mapping[str, Path]]
"""(data folder, output folder, **corpus settings) -> the manifests of ``train``, ``valid`` and any test sets."""


def train(argv: Sequence[str], prepare: Prepare | None = None) -> None:
    """The body of every recipe, and of ``cald-speech train``: ``experiment.yaml [--key value ...]``.

    What a user can mend ends in a one-paragraph message and exit status 2, never in a traceback.

    Arguments
    ---------
    prepare : makes the manifests; None: that of the recipe which the experiment names (``recipe``).
    """
    if {"-h", "--help"} & set(argv):
        print(f"Usage: train.py EXPERIMENT [--KEY VALUE]...\n\n{command_line.help_text()}", end="")
        return
    _set_up_logging()
    try:
        with error_epilogue():
            run(argv, prepare)
    finally:
        distributed.leave()


def run(argv: Sequence[str], prepare: Prepare | None = None) -> CaldBrain:
    """What :func:`train` does, with errors raised; returns the Brain after training."""
    line = command_line.read(argv)
    settings = _load(line)
    folder = Path(settings.output_folder)
    text = resolved_yaml(settings, experiment_file(line.experiment), line.overrides)
    if prepare is not None and "recipe" in line.keys:
        raise UserError(
            f"--recipe: expected no other recipe than the script's own, got {settings.recipe}. Leave it out, or use "
            "`cald-speech train`"
        )
    prepare = prepare or prepare_of(settings.recipe)
    with _writing_to(folder, settings.prepare_folder), locked(folder) if distributed.is_main() else nullcontext():
        record = RunRecord(settings, text, argv, go_on=line.go_on)
        distributed.join(line.run_opts)
        data = prepare_data(settings, prepare)
        record.compare_data(settings.task.modality.fingerprint(data["train"]))
        seed_everything(settings.seed)
        models = build_models(settings, data["train"])
        logger.info("%s", models.conversion)
        brain = make_brain(settings, data, models, line.run_opts)
        brain.record = record
        # Ranks draw different dropout and SpecAugment masks.
        seed_everything(settings.seed + distributed.rank())
        brain.run_epochs(*make_loaders(settings, data, models.processor))
        if distributed.is_main():
            score_test_sets(settings, data, device=str(brain.device), progress=not brain.noprogressbar)
    return brain


@contextmanager
def _writing_to(*folders: str | Path | None) -> Iterator[None]:
    """What the block raises where a disk is full, or a folder cannot be written, as a UserError that says where."""
    try:
        yield
    except InUse as error:
        raise UserError(str(error)) from error
    except OSError as error:
        place = Path(error.filename).absolute() if isinstance(error.filename, str | Path) else None
        inside = [folder for folder in folders if folder and place and place.is_relative_to(Path(folder).absolute())]
        if error.errno not in FULL and not (error.errno in CLOSED and inside):
            raise
        where = place or " or ".join(str(folder) for folder in folders if folder)
        raise UserError(
            f"cannot write {where}: {error.strerror}. Nothing is left there by halves: make room, or give another "
            "--output_folder, and start the same command again"
        ) from error


def parse(argv: Sequence[str]) -> tuple[Settings, RunOptions]:
    """The experiment with the command line's keys on top, and SpeechBrain's run options (``--device``, ...).

    The experiment is a file, or, where there is none, the shipped one of that name (hparams/mamba.yaml).
    """
    line = command_line.read(argv)
    return _load(line), line.run_opts


def _load(line: command_line.CommandLine) -> Settings:
    path = experiment_file(line.experiment)
    settings = Settings.load(path, line.overrides)
    if idle := idle_keys(settings, path, line.overrides):
        logger.info("of the experiment's keys this run does not read: %s", ", ".join(idle))
    return settings


def prepare_of(recipe: str | None) -> Prepare:
    """The ``prepare()`` of a folder of recipes/. Raises UserError where there is none of that name."""
    known = sorted(path.parent.name for path in recipes_folder().glob("*/prepare.py"))
    if recipe not in known:
        raise UserError(
            f"recipe: expected one of {', '.join(known)} (the folders in {recipes_folder()}, whose prepare() makes the "
            f"manifests), got {recipe!r}. Set it in the experiment's yaml, or give --recipe"
        )
    return import_module(f"cald_speech.recipes.{recipe}.prepare").prepare


def prepare_data(settings: Settings, prepare: Prepare) -> Mapping[str, Path]:
    """The recipe's manifests; the main process makes them, the others find them made."""
    folders = Path(settings.data_folder), Path(settings.prepare_folder or settings.output_folder)
    try:
        inspect.signature(prepare).bind(*folders, **settings.corpus)
    except TypeError as error:
        raise UserError(f"corpus: {error}; its keys are the arguments of the recipe's prepare()") from error
    if distributed.is_main():
        sweep(settings.output_folder)
        if settings.prepare_folder:
            # Runs on other machines may write there at this moment.
            sweep(settings.prepare_folder, older_than_s=3600.0)
        prepare(*folders, **settings.corpus)
    ddp_barrier()
    data = prepare(*folders, **settings.corpus)
    if not set(LEARNT_FROM) <= data.keys():
        raise UserError(f"corpus: expected sets called train and valid, got {', '.join(data) or 'none'}")
    return data


def seed_everything(seed: int) -> None:
    """Seed every generator that initialisation, dropout and SpecAugment draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_brain(settings: Settings, data: Mapping[str, Path], models: Models, run_opts: RunOptions) -> CaldBrain:
    """The Brain with its checkpoints and model folders under ``output_folder``."""
    folder = Path(settings.output_folder)
    conversion = models.conversion
    facts = {
        "model": type(models.student).__name__,
        "pipeline": models.family.pipelines[settings.task.head],
        "teacher": str(settings.teacher) if models.teacher is not None else "none",
        "version": cald_speech.__version__,
        **conversion.facts(),
        "guidance": type(settings.guidance).__name__.lower(),
        "steps": settings.num_steps,
        "data": f"{data['train'].stem}, manifest {settings.task.modality.fingerprint(data['train'])[:12]}",
        "licence": settings.licence,
    }
    if "normaliser" not in settings.task.unread:
        facts["normaliser"] = settings.normaliser
    if isinstance(start := settings.teacher or settings.source, str) and (base := base_model_of(start)):
        facts["base_model"] = base
    store, checkpointer = ModelStore(folder, models.processor, facts), AtomicCheckpointer(folder / "checkpoints")
    put_on_adapters(settings, models, store, anew=checkpointer.newest() is None)
    try:
        return CaldBrain(models, settings, store, checkpointer, run_opts)
    except ValueError as error:
        raise UserError(f"precision: {error}") from error


def make_loaders(settings: Settings, data: Mapping[str, Path], processor: Processor) -> tuple[DataLoader, DataLoader]:
    """Of optimiser steps, which a :class:`StepSampler` orders, and of validation batches."""
    task, modality = settings.task, settings.task.modality
    options = {"normaliser": settings.normaliser, "unknown": settings.unknown_characters}
    if settings.short_first_steps and not isinstance(modality, Audio):
        raise UserError("short_first_steps: expected 0, since this task reads text, got another. Leave it out")
    train_set, valid_set = (task.dataset(data[name], processor, **options) for name in LEARNT_FROM)
    for name in data.keys() - set(LEARNT_FROM) if settings.score_test_sets else ():
        task.dataset(data[name], processor, **options | {"unknown": "drop"})  # what is wrong with it is told now
    sampler = StepSampler(
        modality.sizes(train_set),
        settings.max_batch,
        accumulation=settings.accumulation,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        max_batch_utterances=settings.max_batch_utterances,
        seed=settings.seed,
        short_first_steps=settings.short_first_steps,
        short_first_size=settings.short_first_s,
        late_from=settings.num_steps - settings.join_last_steps,
    )
    early = 1 if settings.join_last_steps else settings.join_utterances
    change, late_change = (
        task.change(processor, join_utterances=number, pause_s=settings.join_pause_s)
        for number in (early, settings.join_utterances)
    )
    steps = step_loader(train_set, sampler, change=change, late_change=late_change, num_workers=settings.num_workers)
    return steps, batch_loader(valid_set, modality.sizes(valid_set), settings.max_batch)


def _set_up_logging() -> None:
    """Our own progress, and of SpeechBrain's (each of whose loggers sets its own level) what is a warning or worse."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for handler in logging.root.handlers:
        handler.addFilter(lambda record: record.levelno >= logging.WARNING or "speechbrain" not in record.name)
