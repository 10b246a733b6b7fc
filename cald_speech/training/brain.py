"""The one Brain: fine-tunes a teacher, and converts a student under any guidance.

SpeechBrain runs the epochs, the precision, the processes and the checkpoints. One ``batch`` of its loop is one
optimiser step here, a list of padded batches: so accumulation groups are never cut by a checkpoint, and the units that
the losses are divided by are known before the first backward pass. The step is :meth:`CaldBrain.fit_batch`.
"""

import logging
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from speechbrain import Brain, Stage
from speechbrain.core import INTRA_EPOCH_CKPT_FLAG
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.checkpoints import ckpt_recency
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.run_opts import RunOptions
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from cald_speech.distillation import LossWeights
from cald_speech.errors import UserError, some_of
from cald_speech.training.averaging import check_average, last_conversion, mean_weights, validated_first
from cald_speech.training.checkpointing import AtomicCheckpointer, ModelStore, Progress, RandomState, StepLog
from cald_speech.training.distributed import all_ranks, is_main, sum_gradients, world_size
from cald_speech.training.guards import Interruption, SkippedSteps, finite_items, first_nonfinite
from cald_speech.training.loggers import ended
from cald_speech.training.models import Models, TeacherTraining
from cald_speech.training.objective import Counts, Losses, Objective, step_values
from cald_speech.training.optimiser import (
    make_optimiser,
    parameter_groups,
    set_learning_rate,
    step_if_finite,
    take_up_parameters,
)
from cald_speech.training.record import RunRecord
from cald_speech.training.settings import Settings
from cald_speech.training.sharding import WholeState, check_shard, shard

logger = logging.getLogger(__name__)
# In what a checkpoint tells of itself: the step, and how many there are of each kind once it is saved.
TAKEN_STEPS, KEPT = "optimizer_steps", "num_to_keep"


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
        self.plain = models.student  # `modules.student` may have DistributedDataParallel around it
        # Not among the modules: those are put into train mode each epoch, and a teacher keeps its dropout off.
        self.teacher = None if models.teacher is None else models.teacher.to(self.device).eval().requires_grad_(False)
        self.teacher_training = TeacherTraining(self.teacher, settings) if settings.guidance.trains_teacher else None
        self.objective = Objective(settings, models.family, models.student, self.teacher)

        self.skipped = SkippedSteps(settings.nonfinite_patience)
        self.interruption = Interruption()
        self.progress = Progress(settings.guidance, self.skipped)
        self.record: RunRecord | None = None  # where the run is one from the command line
        self.bar: tqdm | None = None  # of the whole run; SpeechBrain's has an epoch's length
        self.step_log: StepLog | None = None  # of the main process, once it is known where the run is taken up
        self.has_ended = False
        self.spoilt: list[str] = []  # utterances of a validation whose outputs are not finite
        self.stepped = False  # since the newest checkpoint

        # What a checkpoint holds, beside the optimiser, the epoch and SpeechBrain's own counters.
        if settings.shard:
            check_shard(settings, models.student.config)
        checkpointer.add_recoverable("student", WholeState(self.plain) if settings.shard else self.plain)
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
        if self.settings.average_checkpoints > 1:
            check_average(self.settings, steps.sampler, last_conversion(self.models.stepwise))
        epochs = EpochCounter(limit=sys.maxsize)  # num_steps ends the run
        self.checkpointer.add_recoverable("epochs", epochs)
        self.bar = tqdm(
            total=self.settings.num_steps,
            bar_format="step {n_fmt} of {total_fmt} |{bar:20}| {remaining} left{postfix}",
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # a file gets a line each time
            dynamic_ncols=True,
            disable=self.noprogressbar or not is_main(),
        )
        with self.interruption.watched(), self.bar, ended(self.settings.logger):
            self.fit(epochs, steps, validation)
        if self.settings.average_checkpoints > 1:
            self._save_average(validation)
        kind = "mean" if self.settings.average_checkpoints > 1 else "best"
        logger.info("trained for %d steps; the %s model: %s", self.optimizer_step, kind, self.store.folder / "model")

    # --- one optimiser step -----------------------------------------------------------------------------------------

    def fit_batch(self, batch: list[PaddedBatch]) -> Tensor:
        """One optimiser step over the batches of ``batch``; returns its loss."""
        step, batches, guidance = self.optimizer_step, batch, self.settings.guidance
        weights, learning_rate = guidance.weights(step), self.settings.learning_rate_at(step)
        counts = self.objective.count(batches).over_ranks(self.device)

        if self._is_converted_at(step):
            self._convert(step)
        guidance.update(step, self.teacher)
        if not guidance.updates_last:
            self._train_teacher(step, batches, counts)

        if step == guidance.align_steps:
            # What the optimiser knows of the gradients' sizes is of another loss.
            self.optimizer.state.clear()
        set_learning_rate(self.optimizer, learning_rate)
        losses = [self._backward(b, weights, counts, last=b is batches[-1]) for b in batches]
        if not weights.runs_student:
            sum_gradients(self.objective.aligned_parameters())
        elif self.models.adapters is not None:
            self.models.adapters.check_gradients()
        norm = self._update(batches, losses)
        if guidance.updates_last:
            self._train_teacher(step, batches, counts)
        self.optimizer_step += 1

        if step % self.settings.log_every_steps == 0:
            self._log_step(step, losses, {"gradient_norm": norm, "learning_rate": learning_rate})
        if self.settings.waypoint_every_steps and self.optimizer_step % self.settings.waypoint_every_steps == 0:
            self._check_weights()
            self.store.save(f"waypoints/step-{self.optimizer_step:07d}", self._whole_student())
        if self._asked_to_stop():
            self._save_intra_epoch_ckpt()
            self._stop("a checkpoint is saved: the same command goes on from it")
        loss = torch.stack([loss.total.detach() for loss in losses]).sum().cpu()
        if self.bar is not None:
            self.bar.set_postfix_str(f"learning rate {learning_rate:.3g}, loss {loss:.4g}", refresh=False)
            self.bar.update()
        return loss

    def _is_converted_at(self, step: int) -> bool:
        return step > 0 and self.models.stepwise is not None and self.models.stepwise.is_due(step)

    def _convert(self, step: int) -> None:
        """Convert the layers that are due. The optimiser keeps what it knows of the parameters that stay."""
        self._convert_layers(step)
        groups = parameter_groups(self.plain, self.settings.weight_decay, decay=self.settings.decay)
        take_up_parameters(self.optimizer, groups)
        # Processes exchange the gradients of what was there when they were connected, and now begin alike again.
        self.modules["student"] = self.plain
        self._wrap_distributed()
        self.progress.best_metric = math.inf  # of another model, which had more attention
        logger.info("before optimiser step %d: %s", step, self.models.conversion.describe_layers())

    def _convert_layers(self, step: int) -> None:
        """Make the student what step ``step`` is taken with, and tell so wherever it is told."""
        self.models.conversion = self.models.stepwise.convert_for(step)
        self.store.facts |= self.models.conversion.facts()

    def _train_teacher(self, step: int, batches: list[PaddedBatch], counts: Counts) -> None:
        """The teacher's own optimiser step, where the guidance has one at ``step``."""
        guidance = self.settings.guidance
        if guidance.trains_teacher_at(step):
            learning_rate = self.settings.learning_rate_at(step, guidance.teacher_learning_rate)
            self.teacher_training.step(batches, counts.task, learning_rate, self.training_ctx)

    def _backward(self, batch: PaddedBatch, weights: LossWeights, counts: Counts, *, last: bool) -> Losses:
        """Add a batch's gradients to those of the step; ranks exchange them with the last one."""
        with self.no_sync(not last):
            with self.training_ctx:
                losses = self.objective(self.modules.student, batch, weights, counts)
            # DistributedDataParallel and fully_shard average the ranks' gradients, and ours are shares of one sum. They
            # see what goes through the student as a whole.
            self.scaler.scale(losses.total * (world_size() if weights.runs_student else 1)).backward()
        return losses

    def _update(self, batches: list[PaddedBatch], losses: list[Losses]) -> float:
        """Clip and step, or skip the step if anything is not finite; returns the gradient's norm."""

        def losses_are_finite() -> bool:
            return all_ranks(all(bool(torch.isfinite(loss.total)) for loss in losses), self.device)

        norm, taken = step_if_finite(self.optimizer, self.scaler, self.settings.max_grad_norm, losses_are_finite)
        if taken:
            self.skipped.taken()
            self.stepped = True
        else:
            utterances = [i for b in batches for i in b.id]
            self.skipped.skip(self.optimizer_step, utterances, self._way_back)
        return norm

    def _log_step(self, step: int, losses: list[Losses], values: dict[str, float]) -> None:
        """The step's loss terms over all ranks, the distance of each layer, and ``values``."""
        terms = step_values(losses, list(self.objective.mixers))  # on every rank: they are summed
        if self.step_log is not None:
            self.step_log.write(step, terms | values | {"skipped_steps": self.skipped.count})

    def _asked_to_stop(self) -> bool:
        return not all_ranks(self.interruption.signal is None, self.device)

    def _stop(self, how_to_go_on: str) -> None:
        logger.warning("stopped by a signal after optimiser step %d; %s", self.optimizer_step, how_to_go_on)
        raise SystemExit(128 + (self.interruption.signal or signal.SIGTERM))

    # --- what is kept -----------------------------------------------------------------------------------------------

    def _save_model(self, facts: dict[str, object]) -> None:
        """The run's model as it is now, and its adapters beside it."""
        self.store.save("model", self._whole_student(), **facts)
        if self.models.adapters is not None:
            self.models.adapters.save(self.store.folder / "adapter")

    def _whole_student(self) -> PreTrainedModel:
        """The student as its folder has it: adapters are merged into its weights."""
        return self.plain if self.models.adapters is None else self.models.adapters.merged()

    def _checkpoint(self, *, end_of_epoch: bool, meta: dict[str, float | bool], **keep) -> None:
        """A checkpoint, which holds no weight that is not finite, in place of those before it.

        After a step that was skipped the newest one from before it is kept too: what spoilt that step may be in the
        weights already.
        """
        self._check_weights()
        if self.step_log is not None:
            self.step_log.settle()
        num_to_keep = 2 if self.skipped.in_a_row else 1
        if end_of_epoch:
            num_to_keep = max(num_to_keep, self.settings.average_checkpoints)
            keep["importance_keys"] = self._kept_for_average()
        meta = meta | {TAKEN_STEPS: self.optimizer_step, KEPT: num_to_keep}
        keep |= {"num_to_keep": num_to_keep, "verbosity": logging.DEBUG}
        self.checkpointer.save_and_keep_only(meta=meta, end_of_epoch=end_of_epoch, **keep)
        self.stepped = False

    def _kept_for_average(self) -> list:
        return [validated_first(self.settings.task.metric)] if self.settings.average_checkpoints > 1 else []

    def _save_average(self, validation: DataLoader) -> None:
        """Make the mean of the last validated models the run's model, with its own validation."""
        task, since = self.settings.task, last_conversion(self.models.stepwise)
        found = self.checkpointer.find_checkpoints(
            ckpt_predicate=lambda c: task.metric in c.meta and c.meta[TAKEN_STEPS] > since,
            max_num_checkpoints=self.settings.average_checkpoints,
        )
        before = {name: weight.clone() for name, weight in self.plain.state_dict().items()}
        self.plain.load_state_dict(mean_weights(found))
        self.on_stage_start(Stage.VALID)
        self.modules.eval()
        for batch in validation:
            self.evaluate_batch(batch, Stage.VALID)
        metric, steps = task.score(self.results), sorted(c.meta[TAKEN_STEPS] for c in found)
        mean = f"of the weights after steps {', '.join(map(str, steps))}"
        if self.spoilt or math.isnan(metric):
            raise UserError(
                f"average_checkpoints: the mean {mean} gives a validation that is not finite. The best validated model "
                f"is in {self.store.folder / 'model'}; leave the average out"
            )
        logger.info("the mean %s: validation %s %.2f%s", mean, task.metric, metric, task.unit)
        facts = {"valid": {task.metric: metric, "step": self.optimizer_step}, "mean": mean}
        self._save_model(facts)
        self.plain.load_state_dict(before)

    def _save_intra_epoch_ckpt(self) -> None:
        flag = {INTRA_EPOCH_CKPT_FLAG: True}
        self._checkpoint(end_of_epoch=False, meta=flag, ckpt_predicate=lambda c: INTRA_EPOCH_CKPT_FLAG in c.meta)

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time: float, steps_since_ckpt: int) -> bool:
        return not self.skipped.in_a_row and super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)

    def _check_weights(self) -> None:
        """Raise UserError for a weight that is not finite, before any of them is saved."""
        for name, model in (("student", self.plain), ("teacher", self.teacher)):
            weight = None if model is None else first_nonfinite(model)
            if weight is not None:
                raise UserError(
                    f"after optimiser step {self.optimizer_step} the {name}'s {weight} is not finite, and nothing of "
                    f"it is saved. Lower learning_rate, or use --precision=fp32. {self.checkpointer.way_back()}"
                )

    def _way_back(self) -> str:
        return self.checkpointer.way_back(spoilt=not self.stepped)

    # --- SpeechBrain's hooks, in the order in which it calls them -----------------------------------------------------

    def _wrap_distributed(self) -> None:
        if self.settings.shard:
            shard(self.plain, torch.device(self.device))
        else:
            super()._wrap_distributed()

    @contextmanager
    def no_sync(self, use: bool = True) -> Iterator[None]:
        if self.settings.shard:
            self.plain.set_requires_gradient_sync(not use)
            yield
        else:
            with super().no_sync(use):
                yield

    def init_optimizers(self) -> None:
        options = self.settings.learning_rate, self.settings.weight_decay
        self.optimizer = make_optimiser(self.plain, *options, decay=self.settings.decay)
        self.optimizers_dict = {"optimizer": self.optimizer}
        kept = WholeState(self.plain, self.optimizer) if self.settings.shard else self.optimizer
        self.checkpointer.add_recoverable("optimizer", kept)

    def on_fit_start(self) -> None:
        self._convert_as_saved()
        super().on_fit_start()
        if is_main():
            phases = [] if self.record is None else self.record.start(self.optimizer_step)
            self.store.facts |= {"phases": phases} if phases else {}
            recovered = self.checkpointer.recovered
            in_epoch = recovered is not None and not recovered.meta["end-of-epoch"]
            options = {"in_epoch": in_epoch, "logger": self.settings.logger}
            self.step_log = StepLog(self.store.folder, self.optimizer_step, **options)
        if self.bar is not None:
            self.bar.initial = self.bar.n = min(self.optimizer_step, self.settings.num_steps)
        if self.optimizer_step:
            logger.info("resumed at optimiser step %d of %d", self.optimizer_step, self.settings.num_steps)

    def _convert_as_saved(self) -> None:
        """Convert what was converted when the checkpoint was saved that is loaded next."""
        stepwise = self.models.stepwise
        newest = self.checkpointer.newest() if stepwise is not None and stepwise.groups else None
        if newest is not None:
            self._convert_layers(max(0, newest.meta.get(TAKEN_STEPS, 1) - 1))

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if stage == Stage.TRAIN:
            self.train_sampler.start, self.train_sampler.first = self.step, self.optimizer_step
        else:
            self.results, self.spoilt = {}, []

    def _fit_train(self, train_set, epoch: int, enable: bool) -> None:
        # A run that had ended before: its checkpoint is from after its last validation.
        self.has_ended = self.step == 0 and self._optimizer_step_limit_exceeded
        if self.has_ended and self.checkpointer.recovered is not None:  # it may have been killed before it deleted
            kept = self.checkpointer.recovered.meta.get(KEPT, 2)
            keys = {"importance_keys": (ckpt_recency, *self._kept_for_average())}
            self.checkpointer.delete_checkpoints(num_to_keep=kept, min_keys=[self.settings.task.metric], **keys)
        super()._fit_train(train_set, epoch, enable=False)
        self.train_sampler.start = 0

    def _fit_valid(self, valid_set, epoch: int, enable: bool) -> None:
        if self.has_ended:
            return
        # The last epoch is always validated, so that every run ends with a model in its folder.
        if epoch % self.settings.validate_every_epochs == 0 or self._optimizer_step_limit_exceeded:
            super()._fit_valid(valid_set, epoch, enable=False)

    def evaluate_batch(self, batch, stage: Stage) -> Tensor:
        """Results of a validation batch; returns the mean loss of a unit."""
        task = self.settings.task
        with torch.no_grad(), self.evaluation_ctx:
            inputs, lengths = task.modality.arguments(batch, self.plain)
            outputs = task.outputs(self.plain(**inputs))
            followed = task.outputs(self.teacher(**inputs)) if task.compares else None
            loss = task.loss(outputs, lengths, batch)
        sound = finite_items(outputs, lengths if task.framewise else None)
        if not loss.isfinite():
            sound = [False] * len(sound)
        self.spoilt += [utterance for utterance, is_sound in zip(batch.id, sound, strict=True) if not is_sound]
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
        # SpeechBrain leaves losses that are not finite out of its mean.
        values = {f"valid/{name}": metric, "valid/loss": math.nan if self.spoilt else float(stage_loss)}
        if not all_ranks(not self.spoilt and not math.isnan(metric), self.device):
            self._leave_out(values)
            return
        if metric <= self.progress.best_metric:
            self._check_weights()
            self.progress.best_metric = metric
            self._save_model({"valid": {name: metric, "step": self.optimizer_step}})
            if self.teacher_training is not None:
                self.store.save("teacher", self.teacher, teacher="none: it is the teacher, fine-tuned in the same run")
        # The log first: of a run that is killed in between, the line is written again, and not lost.
        self._log_validation(values)
        self._checkpoint(end_of_epoch=True, meta={name: metric}, min_keys=[name])
        if self._asked_to_stop():
            self._stop("a checkpoint is saved: the same command goes on from it")

    def _log_validation(self, values: dict[str, float]) -> None:
        if self.step_log is not None:
            # With the last step before it, since a resumed run keeps the log of the steps before its first.
            self.step_log.write(self.optimizer_step - 1, values)

    def _leave_out(self, values: dict[str, float]) -> None:
        """What comes of a validation that is not finite: no model and no checkpoint. Raises UserError at the end."""
        self._check_weights()
        self._log_validation(values)
        utterances = some_of(self.spoilt, separator=" ") or "none by itself"
        what = (
            f"the validation after step {self.optimizer_step} is not finite (utterances: {utterances}): neither model "
            "nor checkpoint is saved of it"
        )
        if self._optimizer_step_limit_exceeded:
            ways = "Look at these utterances, lower learning_rate, or use --eval_precision=fp32"
            raise UserError(f"{what}. {ways}. {self._way_back()}")
        logger.warning("%s", what)
        if self._asked_to_stop():
            self._stop(self._way_back())
