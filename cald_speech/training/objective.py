"""CALD's equation: the loss of one batch of an optimiser step.

    loss = alpha_task * task + alpha_layer * layer_loss + alpha_logits * logit_loss

(He & Garner, arXiv 2410.06846, section 3.) It is evaluated in :meth:`Objective.__call__`. Each term is a sum over units
(characters, utterances, frames) divided by the units of the whole step, over all its batches and ranks, which are
counted before any forward pass: so the terms of the batches add up to the term of the step. The parts are in
``cald_speech/distillation/losses.py`` and, for the task, in ``cald_speech/tasks/``; the weights are the guidance's.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cald_speech.distillation import LossWeights, captured_slots, captured_states, layer_distances
from cald_speech.errors import UserError
from cald_speech.families import Family
from cald_speech.families.front_end import SharedMasks
from cald_speech.mixers import Mixer
from cald_speech.training.distributed import summed, world_size
from cald_speech.training.settings import Settings


@dataclass
class Counts:
    """Units of one optimiser step, over all its batches and ranks: what the loss sums are divided by."""

    task: float
    frames: float
    layer_frames: float
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
    slots: Tensor  # of each converted layer; zeros but during slot alignment


class Objective:
    """The loss of a student, converted or not, under the weights of a guidance mode.

    Arguments
    ---------
    settings : its task, form of the loss, normalisation and mask.
    student, teacher : models of one family; the teacher is None where no step needs one.

    Raises
    ------
    UserError
        before any step, for a form of the loss that these models cannot have.
    """

    def __init__(self, settings: Settings, family: Family, student: PreTrainedModel, teacher: PreTrainedModel | None):
        self.task, self.form, self.divides_as = settings.task, settings.loss, settings.normalisation
        self.family, self.student, self.teacher = family, student, teacher
        self.masks = None
        if teacher is not None:
            self._check(settings)
            if settings.teacher_mask == "student":
                self.masks = SharedMasks(teacher, student)

    @property
    def mixers(self) -> dict[int, Mixer]:
        """Of each layer that is converted by now."""
        mixers = map(self.family.mixer, self.family.layers(self.student))
        return {index: mixer for index, mixer in enumerate(mixers) if mixer is not None}

    @property
    def num_states(self) -> int:
        """How many states the layer loss compares."""
        return self.form.num_states(len(self.family.layers(self.student)))

    def __call__(self, runner: nn.Module, batch: PaddedBatch, weights: LossWeights, counts: Counts) -> Losses:
        """Run student and teacher on a batch. ``runner`` is the student, with whatever is wrapped around it."""
        inputs, lengths = self.task.modality.arguments(batch, self.student)
        zero = torch.zeros((), device=lengths.device)
        layers, logits, slots = zero.expand(self.num_states), zero, zero.expand(len(self.mixers))
        if not weights.runs_student:
            slots = self._slot_distances(inputs, self._layer_frames(lengths)) / max(1.0, counts.layer_frames)
            return Losses(weights.slot_alignment * slots.mean(), zero, layers, logits, slots.detach())

        task_units, frames, layer_frames = self._divisors(batch, counts)
        outputs, states = self._run_student(runner, inputs)
        task = self.task.loss(outputs, lengths, batch) / task_units
        total = weights.task * task
        if weights.layer or weights.logits:
            teacher_outputs, teacher_states = self._run_teacher(inputs)
            compared = self._compared(batch, lengths)
        if weights.layer:
            seen = None if compared is None else self._layer_frames(compared)
            layers = self._layer_distances(states, teacher_states, seen) / layer_frames
            total = total + weights.layer * self.form.layer_loss(layers)
        if weights.logits:
            units = frames if self.task.framewise else task_units
            logits = self._divergence(outputs, teacher_outputs, compared) / units
            total = total + weights.logits * logits
        return Losses(total, task.detach(), layers.detach(), logits.detach(), slots)

    def count(self, batches: list[PaddedBatch]) -> Counts:
        """The units of these batches, known before any forward pass."""
        units = [self._units(batch) for batch in batches]
        return Counts(*(sum(of_kind) for of_kind in zip(*units, strict=True)), len(batches))

    def aligned_parameters(self) -> list[nn.Parameter]:
        """What trains during slot alignment."""
        return [p for mixer in self.mixers.values() for p in mixer.parameters() if p.requires_grad]

    # --- student and teacher ----------------------------------------------------------------------------------------

    def _run_student(self, runner: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Its outputs and its compared states."""
        if self.masks is not None:
            self.masks.remember()
        with captured_states(self.family.layers(self.student), embedding=self.form.embedding) as states:
            outputs = self.task.outputs(runner(**inputs))
        return outputs, states

    def _run_teacher(self, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Its outputs and its compared states, without gradients; under the student's mask where that is shared."""
        masked = nullcontext() if self.masks is None else self.masks.drawn_again()
        layers = self.family.layers(self.teacher)
        with torch.no_grad(), masked, captured_states(layers, embedding=self.form.embedding) as states:
            outputs = self.task.outputs(self.teacher(**inputs))
        return outputs, states

    # --- distances --------------------------------------------------------------------------------------------------

    def _layer_distances(self, student: list[Tensor], teacher: list[Tensor], lengths: Tensor | None) -> Tensor:
        student, teacher = self._as_compared(self.student, student), self._as_compared(self.teacher, teacher)
        return self.form.distances(student, teacher, lengths)

    def _as_compared(self, model: PreTrainedModel, states: list[Tensor]) -> Sequence[Tensor]:
        return self.form.compared(states, lambda last: self.family.final_norm(model)(last))

    def _divergence(self, student: Tensor, teacher: Tensor, lengths: Tensor | None) -> Tensor:
        if not self.task.framewise:
            student, teacher, lengths = student[:, None], teacher[:, None], None
        pairs = zip(*map(self.task.distributions, (student, teacher)), strict=True)
        return sum(self.form.logit_loss(ours, theirs, lengths, self.task.blank) for ours, theirs in pairs)

    def _slot_distances(self, inputs: dict[str, Tensor], lengths: Tensor) -> Tensor:
        """Squared distance of each mixer's output from the attention's, both fed what the teacher's layer gets."""
        layers = self.family.layers(self.teacher)
        ends = [self.family.slot_ends(layers[i]) for i in self.mixers]
        with torch.no_grad(), captured_slots(ends) as (entering, leaving):
            self.family.base(self.teacher)(**inputs)
        outputs = [mixer(x, lengths) for mixer, x in zip(self.mixers.values(), entering, strict=True)]
        return layer_distances(outputs, leaving, lengths)[0]

    # --- units ------------------------------------------------------------------------------------------------------

    def _units(self, batch: PaddedBatch) -> tuple[int, int, int]:
        """Characters or utterances of the task, compared frames of the output, and of the layers."""
        lengths = self.task.modality.lengths(batch, self.student)
        both = (lengths, self._layer_frames(lengths))
        frames = [int(of.sum()) if self.form.masked else len(of) * int(of.max()) for of in both]
        units = self.task.units(batch)
        if self._drops_hopeless():
            units = units * self.task.can_learn(batch, lengths)
        return int(units.sum()), *frames

    def _layer_frames(self, lengths: Tensor) -> Tensor:
        return self.family.layer_frames(lengths, self.student.config)

    def _divisors(self, batch: PaddedBatch, counts: Counts) -> tuple[float, float, float]:
        """What this batch's task sum and frame sums are divided by; see ``LossForm.by_characters``."""
        task, *frames = (max(1.0, n) for n in (counts.task, counts.frames, counts.layer_frames))
        if self.divides_as == "per_frame":
            return task, *frames
        own_task, *own_frames = (max(1, n) for n in self._units(batch))
        if self.form.by_characters:
            return task, *(n * task / own_task for n in frames)
        return own_task * counts.batches, *(n * counts.batches for n in own_frames)

    def _compared(self, batch: PaddedBatch, lengths: Tensor) -> Tensor | None:
        """(B,) frames of each utterance that the distillation terms see; None: all, padding too."""
        if not self.form.masked:
            return None
        if self._drops_hopeless():
            return lengths * self.task.can_learn(batch, lengths.cpu()).to(lengths.device)
        return lengths

    def _drops_hopeless(self) -> bool:
        # The reference masks an utterance out of every term where its CTC loss is infinite.
        return self.divides_as == "reference" and self.form.by_characters

    def _check(self, settings: Settings) -> None:
        """Raise UserError, before any step, for what the loss would refuse in one."""
        try:
            self.form.check(len(self.family.layers(self.student)))
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.form.blank_weight != 1.0 and self.task.blank is None:
            raise UserError("blank_weight: expected 1, since this task has no blank, got another. Leave it out")
        if settings.guidance.weights(0).slot_alignment and not self.mixers:
            raise UserError("align_steps: expected a layer_map that converts a layer, got one that keeps them all")


def step_values(losses: Sequence[Losses], converted: Sequence[int]) -> dict[str, float]:
    """The terms of a step's batches, summed over them and over the ranks, by the names they have in the log.

    Arguments
    ---------
    converted : the layers that ``Losses.slots`` is about.
    """
    names = ("task", "logits", "layers", "slots")
    terms = [torch.stack([getattr(loss, name) for loss in losses]).sum(0).reshape(-1) for name in names]
    together = summed(torch.cat(terms).double())
    (task,), (logits,), layers, slots = (t.tolist() for t in together.split([len(term) for term in terms]))
    values = {"loss/task": task, "loss/layers": sum(layers) / len(layers), "loss/logits": logits}
    values |= {f"layer_distance/{i:02d}": distance for i, distance in enumerate(layers)}
    if any(slots):
        # Named after the option, align_steps, as logs of earlier runs are.
        values |= {f"alignment/{i:02d}": distance for i, distance in zip(converted, slots, strict=True)}
    return values
