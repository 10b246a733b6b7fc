"""The loss of CALD on one batch: task, hidden states and logits, each a sum over units counted beforehand."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cald_speech.distillation import (
    LossWeights,
    captured_slots,
    captured_states,
    layer_distances,
    layerwise_loss,
    logit_loss,
    reduce_layers,
)
from cald_speech.errors import UserError
from cald_speech.families import Family
from cald_speech.families.front_end import SharedMasks
from cald_speech.training.distributed import summed, world_size
from cald_speech.training.settings import Settings


@dataclass
class Counts:
    """Units of one optimiser step, over all its batches and ranks: what the loss sums are divided by."""

    task: float
    frames: float
    batches: float

    def over_ranks(self, device: torch.device) -> "Counts":
        """The counts of all ranks together."""
        if world_size() == 1:
            return self
        return Counts(*summed(torch.tensor(astuple(self), dtype=torch.float64, device=device)).tolist())


@dataclass
class Losses:
    """Loss terms of one batch, each a share of the step's mean, so that they add up over batches and ranks."""

    total: Tensor  # the weighted sum of the terms, with gradient
    task: Tensor
    layers: Tensor  # of each compared state; zeros where no teacher is followed
    logits: Tensor
    alignment: Tensor  # of each converted layer; zeros but while the mixers are aligned


class Objective:
    """``task + alpha_layer * layer_loss + alpha_logits * logit_loss`` (He & Garner, arXiv 2410.06846, section 3)."""

    def __init__(self, settings: Settings, family: Family, student: PreTrainedModel, teacher: PreTrainedModel | None):
        self.settings, self.family, self.student, self.teacher = settings, family, student, teacher
        self.form = settings.form
        self.mixers = {i: m for i, layer in enumerate(family.layers(student)) if (m := family.mixer(layer)) is not None}
        self.masks = None
        if teacher is not None:
            self._check()
            if settings.teacher_mask == "student":
                self.masks = SharedMasks(teacher, student)

    @property
    def num_states(self) -> int:
        """How many states the layer loss compares."""
        return self.form.num_states(len(self.family.layers(self.student)))

    def aligned_parameters(self) -> list[nn.Parameter]:
        """What trains while the mixers are aligned."""
        return [p for mixer in self.mixers.values() for p in mixer.parameters()]

    def count(self, batches: list[PaddedBatch]) -> Counts:
        """The units of these batches, known before any forward pass."""
        units = [self._units(batch) for batch in batches]
        return Counts(*(sum(of_kind) for of_kind in zip(*units, strict=True)), len(batches))

    def __call__(self, runner: nn.Module, batch: PaddedBatch, weights: LossWeights, counts: Counts) -> Losses:
        """Run student and teacher on a batch. ``runner`` is the student, with whatever is wrapped around it."""
        inputs, lengths = self.settings.task.modality.arguments(batch, self.student)
        zeros = torch.zeros((), device=lengths.device)
        losses = Losses(zeros, zeros, zeros.expand(self.num_states), zeros, zeros.expand(len(self.mixers)))
        if weights.alignment:
            losses.alignment = self._alignment(inputs, lengths) / max(1.0, counts.frames)
            losses.total = weights.alignment * losses.alignment.mean()
        if weights.runs_student:
            self._follow(losses, runner, batch, inputs, lengths, weights, counts)
        detached = (losses.task, losses.layers, losses.logits, losses.alignment)
        return Losses(losses.total, *(term.detach() for term in detached))

    def _follow(self, losses: Losses, runner, batch, inputs, lengths, weights: LossWeights, counts: Counts) -> None:
        """The terms that the student as a whole takes part in, put into ``losses``."""
        task_units, frames = self._divisors(batch, counts)
        if self.masks is not None:
            self.masks.remember()
        with captured_states(self.family.layers(self.student), embedding=self.form.embedding) as states:
            outputs = self.settings.task.outputs(runner(**inputs))
        losses.task = self.settings.task.loss(outputs, lengths, batch) / task_units
        losses.total = losses.total + weights.task * losses.task
        if not (weights.layer or weights.logits):
            return
        masked = nullcontext() if self.masks is None else self.masks.drawn_again()
        layers = self.family.layers(self.teacher)
        with torch.no_grad(), masked, captured_states(layers, embedding=self.form.embedding) as teacher_states:
            teacher_outputs = self.settings.task.outputs(self.teacher(**inputs))
        compared = self._compared(batch, lengths)
        if weights.layer:
            losses.layers = self._distances(states, teacher_states, compared) / frames
            reduced = reduce_layers(losses.layers, self.form.layers, self.form.reduce)
            losses.total = losses.total + weights.layer * reduced
        if weights.logits:
            units = frames if self.settings.task.framewise else task_units
            losses.logits = self._divergence(outputs, teacher_outputs, compared) / units
            losses.total = losses.total + weights.logits * losses.logits

    # --- units ------------------------------------------------------------------------------------------------------

    def _units(self, batch: PaddedBatch) -> tuple[int, int]:
        """Characters or utterances of the task, and compared frames."""
        lengths = self.settings.task.modality.lengths(batch, self.student)
        frames = int(lengths.sum()) if self.form.masked else len(lengths) * int(lengths.max())
        units = self.settings.task.units(batch)
        if self._drops_hopeless():
            units = units * self.settings.task.can_learn(batch, lengths)
        return int(units.sum()), frames

    def _divisors(self, batch: PaddedBatch, counts: Counts) -> tuple[float, float]:
        """What this batch's task sum and frame sums are divided by; see ``LossForm.by_characters``."""
        task, frames = max(1.0, counts.task), max(1.0, counts.frames)
        if self.settings.normalisation == "per_frame":
            return task, frames
        own_task, own_frames = (max(1, n) for n in self._units(batch))
        if self.form.by_characters:
            return task, frames * task / own_task
        return own_task * counts.batches, own_frames * counts.batches

    def _compared(self, batch: PaddedBatch, lengths: Tensor) -> Tensor | None:
        """(B,) frames of each utterance that the distillation terms see; None: all, padding too."""
        if not self.form.masked:
            return None
        if self._drops_hopeless():
            return lengths * self.settings.task.can_learn(batch, lengths.cpu()).to(lengths.device)
        return lengths

    def _drops_hopeless(self) -> bool:
        # The reference masks an utterance out of every term where its CTC loss is infinite.
        return self.settings.normalisation == "reference" and self.form.by_characters

    # --- distances --------------------------------------------------------------------------------------------------

    def _distances(self, student: list[Tensor], teacher: list[Tensor], lengths: Tensor | None) -> Tensor:
        form = self.form
        if not form.last:
            student, teacher = student[:-1], teacher[:-1]
        elif form.final_norm:
            student = [*student[:-1], self.family.final_norm(self.student)(student[-1])]
            teacher = [*teacher[:-1], self.family.final_norm(self.teacher)(teacher[-1])]
        return layer_distances(student, teacher, lengths, normalise=form.normalise, distance=form.distance)[0]

    def _divergence(self, student: Tensor, teacher: Tensor, lengths: Tensor | None) -> Tensor:
        form = self.form
        if not self.settings.task.framewise:
            student, teacher, lengths = student[:, None], teacher[:, None], None
        options = {"temperature": form.temperature, "scale_by_t2": form.scale_by_t2}
        if form.blank_weight != 1.0:
            options |= {"blank": self.settings.task.blank, "blank_weight": form.blank_weight}
        pairs = zip(*map(self.settings.task.distributions, (student, teacher)), strict=True)
        return sum(logit_loss(ours, theirs, lengths, **options)[0] for ours, theirs in pairs)

    def _alignment(self, inputs: dict[str, Tensor], lengths: Tensor) -> Tensor:
        """Squared distance of each mixer's output from the attention's, both fed what the teacher's layer gets."""
        layers = self.family.layers(self.teacher)
        ends = [self.family.slot_ends(layers[i]) for i in self.mixers]
        with torch.no_grad(), captured_slots(ends) as (entering, leaving):
            self.teacher.base_model(**inputs)
        outputs = [mixer(x, lengths) for mixer, x in zip(self.mixers.values(), entering, strict=True)]
        return layer_distances(outputs, leaving, lengths)[0]

    def _check(self) -> None:
        """Raise UserError, before any step, for what the loss would refuse in one."""
        form, states = self.form, [torch.zeros(1, 1, 1)] * self.num_states
        options = {"normalise": form.normalise, "distance": form.distance, "reduce": form.reduce}
        try:
            layerwise_loss(states, states, layers=form.layers, **options)
        except ValueError as error:
            keys = "layer_normalise, layer_distance, layer_weights, layer_reduce"
            raise UserError(f"{keys}: {error}") from error
        if form.blank_weight != 1.0 and self.settings.task.blank is None:
            raise UserError("blank_weight: expected 1, since this task has no blank, got another. Leave it out")
        if self.settings.guidance.weights(0).alignment and not self.mixers:
            raise UserError("align_steps: expected a layer_map that converts a layer, got one that keeps them all")


def step_values(losses: Sequence[Losses], converted: Sequence[int]) -> dict[str, float]:
    """The terms of a step's batches, summed over them and over the ranks, by the names they have in the log.

    converted : the layers that ``Losses.alignment`` is about.
    """
    names = ("task", "logits", "layers", "alignment")
    terms = [torch.stack([getattr(loss, name) for loss in losses]).sum(0).reshape(-1) for name in names]
    together = summed(torch.cat(terms).double())
    (task,), (logits,), layers, alignment = (t.tolist() for t in together.split([len(term) for term in terms]))
    values = {"loss/task": task, "loss/layers": sum(layers) / len(layers), "loss/logits": logits}
    values |= {f"layer_distance/{i:02d}": distance for i, distance in enumerate(layers)}
    if any(alignment):
        values |= {f"alignment/{i:02d}": distance for i, distance in zip(converted, alignment, strict=True)}
    return values
