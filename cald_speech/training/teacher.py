"""A teacher that is fine-tuned in the student's run, for trajectory guidance."""

import logging
from contextlib import AbstractContextManager

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.checkpoints import Checkpointer
from transformers import PreTrainedModel

from cald_speech.families import family_of
from cald_speech.training.optimiser import clip_gradients, parameter_groups, sum_gradients
from cald_speech.training.settings import Settings

logger = logging.getLogger(__name__)


class TeacherTraining:
    """The teacher's own optimiser. Between its steps the teacher is in evaluation mode, as every teacher is."""

    def __init__(self, teacher: PreTrainedModel, settings: Settings):
        self.teacher, self.settings = teacher, settings
        teacher.requires_grad_(True)
        if settings.freeze_front_end:
            family_of(teacher).freeze_front_end(teacher)
        groups = parameter_groups(teacher, settings.weight_decay, decay=settings.decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        # float16 gradients underflow; the student's scaler has seen other gradients.
        self.scaler = torch.amp.GradScaler(teacher.device.type, enabled=settings.precision == "fp16")

    def register(self, checkpointer: Checkpointer) -> None:
        """What a resumed run needs of it."""
        checkpointer.add_recoverable("teacher", self.teacher)
        checkpointer.add_recoverable("teacher_optimizer", self.optimizer)
        if self.scaler.is_enabled():
            checkpointer.add_recoverable("teacher_scaler", self.scaler)

    def step(
        self, batches: list[PaddedBatch], count: float, learning_rate: float, precision: AbstractContextManager
    ) -> None:
        """One optimiser step on the task loss alone, over the student's batches.

        count : characters or utterances of all batches and ranks; precision : the autocast context of training.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.teacher.train()
        for batch in batches:
            inputs, lengths = self.settings.task.modality.arguments(batch, self.teacher)
            with precision:
                outputs = self.settings.task.outputs(self.teacher(**inputs))
                loss = self.settings.task.loss(outputs, lengths, batch) / max(1.0, count)
            self.scaler.scale(loss).backward()
        self.teacher.eval()
        sum_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer, self.settings.max_grad_norm)
        if torch.isfinite(norm):
            self.scaler.step(self.optimizer)
        else:
            logger.warning("the teacher's gradient is not finite: its step is skipped")
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
