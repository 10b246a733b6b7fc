"""Guidance: at each optimiser step, whether a teacher is followed, how strongly, and whether it trains along.

One class a mode (He & Garner, arXiv 2410.06846, section 3). Any mode may begin with an alignment of the mixers, which
the paper has not; a mode's own steps are counted from its end.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from cald_speech.distillation.waypoints import Waypoints, take_over


@dataclass(frozen=True)
class LossWeights:
    """The weights of the loss terms at one step: ``task * T + layer * L + logits * K + alignment * A``."""

    task: float = 1.0
    layer: float = 0.0
    logits: float = 0.0
    alignment: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        return self.layer > 0 or self.logits > 0 or self.alignment > 0

    @property
    def runs_student(self) -> bool:
        """Whether the student is run as a whole; aligning runs its mixers alone."""
        return self.task > 0 or self.layer > 0 or self.logits > 0


ALIGNMENT = LossWeights(task=0.0, alignment=1.0)


class Guidance:
    """Base of the modes. A mode without a teacher never loads one.

    Arguments
    ---------
    align_steps : for so many steps at first, each mixer is fed the teacher's input of its layer and matches what the
        teacher's attention puts out, all layers at once and without labels (MOHAWK, arXiv 2408.10189, section 3.1, does
        so with matrices first). Nothing but the mixers trains.

    ``follows_teacher`` says whether any step after these follows a teacher, ``trains_teacher`` whether that is a copy
    of ``source`` which is fine-tuned in the same run, ``starts_from`` which weights the student takes over: the
    fine-tuned ``teacher``'s, or those of the pretrained ``source`` where one is given.
    """

    follows_teacher = True
    trains_teacher = False
    starts_from = "teacher"

    def __init__(self, align_steps: int = 0):
        self.align_steps = align_steps

    @property
    def needs_teacher(self) -> bool:
        """Whether any step looks at a teacher."""
        return self.follows_teacher or self.align_steps > 0

    def weights(self, step: int) -> LossWeights:
        """The loss weights of optimiser step ``step`` (0 for the first)."""
        return ALIGNMENT if step < self.align_steps else self.mode_weights(step - self.align_steps)

    def update(self, step: int, teacher: nn.Module) -> bool:
        """Called before step ``step``: may change the teacher, and says whether it did."""
        return self.mode_update(max(0, step - self.align_steps), teacher)

    def trains_teacher_at(self, step: int) -> bool:
        """Whether the teacher takes an optimiser step of its own before the student's step ``step``."""
        return step >= self.align_steps and self.mode_trains_teacher(step - self.align_steps)

    def mode_weights(self, step: int) -> LossWeights:
        """As :meth:`weights`, by the step since the end of the alignment."""
        raise NotImplementedError(f"{type(self).__name__} has no mode_weights()")

    def mode_update(self, step: int, teacher: nn.Module) -> bool:
        """As :meth:`update`, by the step since the end of the alignment."""
        return False

    def mode_trains_teacher(self, step: int) -> bool:
        """As :meth:`trains_teacher_at`, by the step since the end of the alignment."""
        return False

    def check(self, num_steps: int) -> None:
        """Raise ValueError, naming the key to mend, if the mode does not fit a run of ``num_steps`` steps."""
        if not 0 <= self.align_steps < num_steps:
            raise ValueError(
                f"guidance.align_steps: expected between 0 and {num_steps - 1} (num_steps is {num_steps}), got "
                f"{self.align_steps}. Use `alignment` guidance to do nothing but align"
            )

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raise ValueError, naming the key to mend, if the mode cannot follow ``teacher``."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the step; these modes are functions of the step alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


class Unguided(Guidance):
    """The task loss alone.

    Example
    -------
    >>> mode = Unguided(align_steps=1)
    >>> [mode.weights(step).task for step in range(3)]
    [0.0, 1.0, 1.0]
    """

    follows_teacher = False
    starts_from = "source"

    def mode_weights(self, step: int) -> LossWeights:
        return LossWeights()


class Alignment(Guidance):
    """Nothing but the alignment, to the end: converts an encoder without labels, once for many tasks.

    Example
    -------
    >>> Alignment().weights(0)
    LossWeights(task=0.0, layer=0.0, logits=0.0, alignment=1.0)
    """

    def mode_weights(self, step: int) -> LossWeights:
        return ALIGNMENT


class Target(Guidance):
    """The fine-tuned teacher, fixed, throughout.

    Arguments
    ---------
    layer : weight of the layer loss (alpha_layer; the paper's speech recipes use 15, and 30 for VoxCeleb1).
    logits : weight of the logit loss (alpha_logits; 1 for TED-LIUM, else 0).
    task : weight of the task loss; 0 distils without labels.
    align_steps : as in :class:`Guidance`.
    """

    def __init__(self, layer: float = 15.0, logits: float = 0.0, task: float = 1.0, align_steps: int = 0):
        super().__init__(align_steps)
        self.target = LossWeights(task, layer, logits)

    def mode_weights(self, step: int) -> LossWeights:
        return self.target


class Hybrid(Target):
    """Target guided for ``switch_step`` steps, then the task loss alone.

    Example
    -------
    >>> mode = Hybrid(switch_step=2, layer=15.0)
    >>> [mode.weights(step).layer for step in range(4)]
    [15.0, 15.0, 0.0, 0.0]
    """

    def __init__(
        self, switch_step: int, layer: float = 15.0, logits: float = 0.0, task: float = 1.0, align_steps: int = 0
    ):
        super().__init__(layer, logits, task, align_steps)
        self.switch_step = switch_step

    def mode_weights(self, step: int) -> LossWeights:
        return self.target if step < self.switch_step else LossWeights()

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        left = num_steps - self.align_steps
        if not 0 < self.switch_step < left:
            raise ValueError(
                f"guidance.switch_step: expected between 1 and {left - 1} (num_steps is {num_steps}, of which "
                f"{self.align_steps} align), got {self.switch_step}. Use `target` guidance for no switch, `unguided` "
                "for no teacher"
            )


class Trajectory(Target):
    """A second model is fine-tuned from the same pretrained weights in the same run, and followed as it learns.

    Arguments
    ---------
    update_every : the teacher takes one optimiser step every so many of the student's (T_u), from the first on.
    layer, logits, task, align_steps : as in :class:`Target`.

    Example
    -------
    >>> mode = Trajectory(update_every=2)
    >>> [mode.trains_teacher_at(step) for step in range(4)]
    [True, False, True, False]
    """

    trains_teacher = True
    starts_from = "source"

    def __init__(
        self,
        update_every: int = 1,
        layer: float = 15.0,
        logits: float = 0.0,
        task: float = 1.0,
        align_steps: int = 0,
    ):
        super().__init__(layer, logits, task, align_steps)
        self.update_every = update_every

    def mode_trains_teacher(self, step: int) -> bool:
        return step % self.update_every == 0

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if not 1 <= self.update_every <= num_steps:
            raise ValueError(
                f"guidance.update_every (teacher_update_every): expected between 1 and {num_steps} (num_steps), got "
                f"{self.update_every}"
            )


class Waypoint(Target):
    """The teacher's saved checkpoints, one after the other: at each step the next one ahead of the student.

    Arguments
    ---------
    waypoints : folder with the checkpoints ``step-<number>`` of the teacher's fine-tuning.
    teacher_steps : steps of the teacher's run that go by in one step of the student's: with 2, the student's step 500
        stands beside the teacher's step 1,000.
    layer, logits, task, align_steps : as in :class:`Target`.
    """

    starts_from = "source"

    def __init__(
        self,
        waypoints: str | Path,
        teacher_steps: float = 1.0,
        layer: float = 15.0,
        logits: float = 0.0,
        task: float = 1.0,
        align_steps: int = 0,
    ):
        super().__init__(layer, logits, task, align_steps)
        self.folder, self.teacher_steps = waypoints, teacher_steps
        self.followed: Path | None = None  # of this process: a resumed run takes its waypoint over again

    def mode_update(self, step: int, teacher: nn.Module) -> bool:
        ahead = self.waypoints.ahead_of(step * self.teacher_steps)
        if ahead == self.followed:
            return False
        take_over(teacher, ahead)
        self.followed = ahead
        return True

    @cached_property
    def waypoints(self) -> Waypoints:
        """Listed when the run starts: not when its yaml is read, so that a yaml can be looked at anywhere."""
        return Waypoints(self.folder)

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if self.teacher_steps <= 0:
            raise ValueError(f"guidance.teacher_steps: expected more than 0, got {self.teacher_steps}")
        last, num_steps = max(self.waypoints.folders), num_steps - self.align_steps
        if num_steps * self.teacher_steps < min(self.waypoints.folders) and last > min(self.waypoints.folders):
            raise ValueError(
                f"guidance.teacher_steps: {num_steps} steps (num_steps) at {self.teacher_steps} of the teacher's each "
                f"end before its first waypoint, of step {min(self.waypoints.folders)}, is passed: expected at least "
                f"{min(self.waypoints.folders) / num_steps:g}, and {last / num_steps:g} to follow it to its end"
            )

    def check_teacher(self, teacher: nn.Module) -> None:
        self.waypoints.check_fit(teacher)
