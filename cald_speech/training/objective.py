"""The loss of CALD on one batch: task, hidden states and logits, each a sum over units counted beforehand."""

from dataclasses import dataclass

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cald_speech.distillation import (
    LossWeights,
    captured_states,
    layer_distances,
    layerwise_loss,
    logit_loss,
    reduce_layers,
)
from cald_speech.errors import UserError
from cald_speech.families import Family
from cald_speech.families.lengths import frame_lengths
from cald_speech.training.settings import Settings


@dataclass
class Counts:
    """Units of one optimiser step, over all its batches and ranks: what the loss sums are divided by."""

    task: float
    frames: float


@dataclass
class Losses:
    """Loss terms of one batch, each a share of the step's mean, so that they add up over batches and ranks."""

    total: Tensor  # the weighted sum of the terms, with gradient
    task: Tensor
    layers: Tensor  # (L,); zeros where no teacher is followed
    logits: Tensor


class Objective:
    """``task + alpha_layer * layer_loss + alpha_logits * logit_loss`` (He & Garner, arXiv 2410.06846, section 3)."""

    def __init__(self, settings: Settings, family: Family, teacher: PreTrainedModel | None):
        self.settings, self.family, self.teacher = settings, family, teacher
        if teacher is not None:
            _check_layer_settings(settings, len(family.layers(teacher)))

    def count(self, batches: list[PaddedBatch], model: PreTrainedModel) -> Counts:
        """The units of these batches, known before any forward pass."""
        frames = sum(int(frame_lengths(sample_lengths(b), model.config).sum()) for b in batches)
        return Counts(sum(self.settings.task.count(b) for b in batches), frames)

    def __call__(
        self, student: nn.Module, plain: PreTrainedModel, batch: PaddedBatch, weights: LossWeights, counts: Counts
    ) -> Losses:
        """Run student and teacher on a batch. ``student`` is called, ``plain`` is the same model without wrappers."""
        inputs, lengths = model_inputs(batch, plain)
        with captured_states(self.family.layers(plain)) as states:
            logits = student(**inputs).logits
        task = self.settings.task.loss(logits, lengths, batch) / max(1.0, counts.task)
        layers, divergence = (
            logits.new_zeros(len(states), dtype=torch.float32),
            logits.new_zeros((), dtype=torch.float32),
        )
        total = weights.task * task
        if weights.needs_teacher:
            with torch.no_grad(), captured_states(self.family.layers(self.teacher)) as teacher_states:
                teacher_logits = self.teacher(**inputs).logits
            frames = max(1.0, counts.frames)
            if weights.layer:
                layers = self._distances(plain, states, teacher_states, lengths) / frames
                total = total + weights.layer * reduce_layers(
                    layers, self.settings.layer_weights, self.settings.layer_reduce
                )
            if weights.logits:
                divergence = self._divergence(logits, teacher_logits, lengths) / frames
                total = total + weights.logits * divergence
        return Losses(total, task.detach(), layers.detach(), divergence.detach())

    def _distances(
        self, plain: PreTrainedModel, student: list[Tensor], teacher: list[Tensor], lengths: Tensor
    ) -> Tensor:
        if self.settings.final_norm_on_last:
            student = [*student[:-1], self.family.final_norm(plain)(student[-1])]
            teacher = [*teacher[:-1], self.family.final_norm(self.teacher)(teacher[-1])]
        return layer_distances(student, teacher, lengths, normalise=self.settings.layer_normalise)[0]

    def _divergence(self, student: Tensor, teacher: Tensor, lengths: Tensor) -> Tensor:
        settings = self.settings
        return logit_loss(
            student,
            teacher,
            lengths,
            temperature=settings.temperature,
            scale_by_t2=settings.scale_by_t2,
            blank=None if settings.blank_weight == 1.0 else settings.task.blank,
            blank_weight=settings.blank_weight,
        )[0]


def _check_layer_settings(settings: Settings, num_layers: int) -> None:
    """Raise UserError, before any step, for what the layer loss would refuse in one."""
    states = [torch.zeros(1, 1, 1)] * num_layers
    options = {"normalise": settings.layer_normalise, "reduce": settings.layer_reduce}
    try:
        layerwise_loss(states, states, layers=settings.layer_weights, **options)
    except ValueError as error:
        raise UserError(f"layer_normalise, layer_weights, layer_reduce: {error}") from error


def sample_lengths(batch: PaddedBatch) -> Tensor:
    """(B,) samples of audio of each utterance, from SpeechBrain's relative lengths."""
    return (batch.wav.lengths * batch.wav.data.size(1)).round().long()


def model_inputs(batch: PaddedBatch, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
    """What a speech model is called with, and its (B,) output lengths in frames; on the model's device."""
    wav = batch.wav.data.to(model.device)
    samples = sample_lengths(batch).to(model.device)
    mask = (torch.arange(wav.size(1), device=wav.device) < samples[:, None]).long()
    return {"input_values": wav, "attention_mask": mask}, frame_lengths(samples, model.config)
