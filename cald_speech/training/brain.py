"""The one Brain: fine-tunes a teacher, and converts a student under any guidance.

SpeechBrain runs the epochs, the precision, the processes and the checkpoints. One ``batch`` of its loop is one
optimiser step here, a list of padded batches: so accumulation groups are never cut by a checkpoint, and the units that
the losses are divided by are known before the first backward pass. The step is :meth:`CaldBrain.fit_batch`.
"""

import logging
import signal
import sys

import torch
from speechbrain import Brain, Stage
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.run_opts import RunOptions
from torch import Tensor
from torch.utils.data import DataLoader

from cald_speech.distillation import LossWeights
from cald_speech.training.checkpointing import AtomicCheckpointer, ModelStore, Progress, RandomState, StepLog
from cald_speech.training.distributed import all_ranks, is_main, sum_gradients, world_size
from cald_speech.training.guards import Interruption, SkippedSteps
from cald_speech.training.models import Models, TeacherTraining
from cald_speech.training.objective import Counts, Losses, Objective, step_values
from cald_speech.training.optimiser import make_optimiser, set_learning_rate, step_if_finite
from cald_speech.training.settings import Settings

logger = logging.getLogger(__name__)


class CaldBrain(Brain):
    """Trains a student.

    Arguments
    ---------
    models : the student, its teacher or None, their family and processor.
    settings : everything else that an experiment says.
    store : writes model folders.
    checkpointer : saves and loads what a resumed run needs, which the Brain adds to it by name.
    run_opts : SpeechBrain's: device, number of processes, progress bar.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        store: ModelStore,
        checkpointer: AtomicCheckpointer,
        run_opts: RunOptions,
    ):
        options = {
            "precision": settings.precision,
            "ckpt_interval_minutes": 0 if settings.checkpoint_every_steps else settings.checkpoint_every_minutes,
            "ckpt_interval_steps": settings.checkpoint_every_steps,
        }
        super().__init__({"student": models.student}, None, options, run_opts, checkpointer)
        self.settings, self.models, self.store = settings, models, store
        self.optimizer_step_limit = settings.num_steps
        self.plain = models.student  # `modules.student` has DistributedDataParallel around it
        # Not among the modules: those are put into train mode each epoch, and a teacher keeps its dropout off.
        self.teacher = None if models.teacher is None else models.teacher.to(self.device).eval().requires_grad_(False)
        self.teacher_training = TeacherTraining(self.teacher, settings) if settings.guidance.trains_teacher else None
        self.objective = Objective(settings, models.family, models.student, self.teacher)

        self.skipped = SkippedSteps(settings.nonfinite_patience)
        self.interruption = Interruption()
        self.progress = Progress(settings.guidance, self.skipped)
        self.step_log: StepLog | None = None  # of the main process, once it is known where the run is taken up
        self.has_ended = False

        # What a checkpoint holds, beside the optimiser, the epoch and SpeechBrain's own counters.
        checkpointer.add_recoverable("student", models.student)
        if self.teacher_training is not None:
            self.teacher_training.register(checkpointer)
        checkpointer.add_recoverable("progress", self.progress)
        checkpointer.add_recoverable("random_state", RandomState())

    def run_epochs(self, steps: DataLoader, validation: DataLoader) -> None:
        """Train until ``num_steps``, from the newest checkpoint if there is one.

        Arguments
        ---------
        steps : of optimiser steps, from :func:`cald_speech.data.batching.step_loader`.
        validation : of padded batches.
        """
        self.train_sampler = steps.sampler  # SpeechBrain calls its set_epoch() before each epoch
        epochs = EpochCounter(limit=sys.maxsize)  # num_steps ends the run
        self.checkpointer.add_recoverable("epochs", epochs)
        with self.interruption.watched():
            self.fit(epochs, steps, validation)
        logger.info("trained for %d steps; the best model: %s", self.optimizer_step, self.store.folder / "model")

    # --- one optimiser step -----------------------------------------------------------------------------------------

    def fit_batch(self, batch: list[PaddedBatch]) -> Tensor:
        """One optimiser step over the batches of ``batch``; returns its loss."""
        step, batches, guidance = self.optimizer_step, batch, self.settings.guidance
        weights, learning_rate = guidance.weights(step), self.settings.learning_rate_at(step)
        counts = self.objective.count(batches).over_ranks(self.device)

        guidance.update(step, self.teacher)
        if guidance.trains_teacher_at(step):
            self.teacher_training.step(batches, counts.task, learning_rate, self.training_ctx)

        if step == guidance.align_steps:
            # What the optimiser knows of the gradients' sizes is of another loss.
            self.optimizer.state.clear()
        set_learning_rate(self.optimizer, learning_rate)
        losses = [self._backward(b, weights, counts, last=b is batches[-1]) for b in batches]
        if not weights.runs_student:
            sum_gradients(self.objective.aligned_parameters())
        norm = self._update(batches, losses)
        self.optimizer_step += 1

        if step % self.settings.log_every_steps == 0:
            self._log_step(step, losses, {"gradient_norm": norm, "learning_rate": learning_rate})
        if self.settings.waypoint_every_steps and self.optimizer_step % self.settings.waypoint_every_steps == 0:
            self.store.save(f"waypoints/step-{self.optimizer_step:07d}", self.plain)
        if self._asked_to_stop():
            self._save_intra_epoch_ckpt()
            self._stop()
        return torch.stack([loss.total.detach() for loss in losses]).sum().cpu()

    def _backward(self, batch: PaddedBatch, weights: LossWeights, counts: Counts, *, last: bool) -> Losses:
        """Add a batch's gradients to those of the step; ranks exchange them with the last one."""
        with self.no_sync(not last):
            with self.training_ctx:
                losses = self.objective(self.modules.student, batch, weights, counts)
            # DistributedDataParallel averages the ranks' gradients, and ours are shares of one sum. It sees what goes
            # through the student as a whole.
            self.scaler.scale(losses.total * (world_size() if weights.runs_student else 1)).backward()
        return losses

    def _update(self, batches: list[PaddedBatch], losses: list[Losses]) -> float:
        """Clip and step, or skip the step if anything is not finite; returns the gradient's norm."""

        def losses_are_finite() -> bool:
            return all_ranks(all(bool(torch.isfinite(loss.total)) for loss in losses), self.device)

        norm, taken = step_if_finite(self.optimizer, self.scaler, self.settings.max_grad_norm, losses_are_finite)
        if taken:
            self.skipped.taken()
        else:
            self.skipped.skip(self.optimizer_step, [i for b in batches for i in b.id])
        return norm

    def _log_step(self, step: int, losses: list[Losses], values: dict[str, float]) -> None:
        """The step's loss terms over all ranks, the distance of each layer, and ``values``."""
        terms = step_values(losses, list(self.objective.mixers))  # on every rank: they are summed
        if self.step_log is not None:
            self.step_log.write(step, terms | values | {"skipped_steps": self.skipped.count})

    def _asked_to_stop(self) -> bool:
        return not all_ranks(self.interruption.signal is None, self.device)

    def _stop(self) -> None:
        logger.warning(
            "stopped by a signal after optimiser step %d; a checkpoint is saved: the same command goes on from it",
            self.optimizer_step,
        )
        raise SystemExit(128 + (self.interruption.signal or signal.SIGTERM))

    # --- SpeechBrain's hooks, in the order in which it calls them -----------------------------------------------------

    def init_optimizers(self) -> None:
        options = self.settings.learning_rate, self.settings.weight_decay
        self.optimizer = make_optimiser(self.plain, *options, decay=self.settings.decay)
        self.optimizers_dict = {"optimizer": self.optimizer}
        self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if is_main():
            self.step_log = StepLog(self.store.folder, self.optimizer_step)
        if self.optimizer_step:
            logger.info("resumed at optimiser step %d of %d", self.optimizer_step, self.settings.num_steps)

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if stage == Stage.TRAIN:
            self.train_sampler.start = self.step
        else:
            self.results = {}

    def _fit_train(self, train_set, epoch: int, enable: bool) -> None:
        # A run that had ended before: its checkpoint is from after its last validation.
        self.has_ended = self.step == 0 and self._optimizer_step_limit_exceeded
        super()._fit_train(train_set, epoch, enable)
        self.train_sampler.start = 0

    def _fit_valid(self, valid_set, epoch: int, enable: bool) -> None:
        if self.has_ended:
            return
        # The last epoch is always validated, so that every run ends with a model in its folder.
        if epoch % self.settings.validate_every_epochs == 0 or self._optimizer_step_limit_exceeded:
            super()._fit_valid(valid_set, epoch, enable)

    def evaluate_batch(self, batch, stage: Stage) -> Tensor:
        """Results of a validation batch; returns the mean loss of a unit."""
        task = self.settings.task
        with torch.no_grad(), self.evaluation_ctx:
            inputs, lengths = task.modality.arguments(batch, self.plain)
            outputs = task.outputs(self.plain(**inputs))
            followed = task.outputs(self.teacher(**inputs)) if task.compares else None
            loss = task.loss(outputs, lengths, batch)
        results = task.results(outputs, followed, lengths, batch, self.models.processor)
        self.results.update(zip(batch.id, results, strict=True))
        return loss.detach().cpu() / max(1, int(task.units(batch).sum()))

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> None:
        if stage != Stage.VALID:
            return
        metric = self.settings.task.score(self.results)
        name = self.settings.task.metric
        unit = self.settings.task.unit
        logger.info("epoch %d, step %d: validation %s %.2f%s", epoch, self.optimizer_step, name, metric, unit)
        if metric <= self.progress.best_metric:
            self.progress.best_metric = metric
            self.store.save("model", self.plain, valid={name: metric, "step": self.optimizer_step})
            if self.teacher_training is not None:
                self.store.save("teacher", self.teacher, teacher="none: it is the teacher, fine-tuned in the same run")
        self.checkpointer.save_and_keep_only(meta={name: metric}, min_keys=[name], verbosity=logging.DEBUG)
        if self.step_log is not None:
            # With the last step before it, since a resumed run keeps the log of the steps before its first.
            self.step_log.write(self.optimizer_step - 1, {f"valid/{name}": metric, "valid/loss": float(stage_loss)})
        if self._asked_to_stop():
            self._stop()
