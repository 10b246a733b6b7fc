"""Guidance: at each optimiser step, whether a teacher is followed, how strongly, and whether it trains along.

One class a mode (He & Garner, arXiv 2410.06846, section 3). The fields of a mode are its options: they have the names
that an experiment and the command line give them, and name, default and meaning stand here alone. Any mode may begin
with slot alignment, which the paper has not; a mode's own steps are counted from its end.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from cald_speech.distillation.options import option
from cald_speech.distillation.waypoints import Waypoints, take_over


@dataclass(frozen=True)
class LossWeights:
    """What the loss of one step is: slot alignment, or ``task * T + layer * L + logits * K``."""

    task: float = 1.0
    layer: float = 0.0
    logits: float = 0.0
    slot_alignment: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        return self.layer > 0 or self.logits > 0 or self.slot_alignment > 0

    @property
    def runs_student(self) -> bool:
        """Whether the student is run as a whole; slot alignment runs its mixers alone."""
        return self.task > 0 or self.layer > 0 or self.logits > 0


SLOT_ALIGNMENT = LossWeights(task=0.0, slot_alignment=1.0)


@dataclass(kw_only=True)
class Guidance:
    """Base of the modes. A mode without a teacher never loads one.

    Arguments
    ---------
    align_steps : for so many steps at first, each mixer is fed the teacher's input of its layer and matches what the
        teacher's attention puts out, all layers at once and without labels (MOHAWK, arXiv 2408.10189, section 3.1, does
        so with matrices first). Nothing but the mixers trains.

    ``follows_teacher`` says whether any step after these follows a teacher, ``trains_teacher`` whether that is a copy
    of ``source`` which is fine-tuned in the same run (``updates_last``: after the student's step and not before it),
    ``starts_from`` which weights the student takes over: the fine-tuned ``teacher``'s, or those of the pretrained
    ``source`` where one is given.
    """

    follows_teacher: ClassVar[bool] = True
    trains_teacher: ClassVar[bool] = False
    teacher_learning_rate: ClassVar[float | None] = None
    starts_from: ClassVar[str] = "teacher"

    align_steps: int = option(0, at_least=0)

    @property
    def updates_last(self) -> bool:
        """Whether the teacher's own step comes after the student's, and not before it."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether any step looks at a teacher."""
        return self.follows_teacher or self.align_steps > 0

    def weights(self, step: int) -> LossWeights:
        """The loss weights of optimiser step ``step`` (0 for the first)."""
        return SLOT_ALIGNMENT if step < self.align_steps else self.mode_weights(step - self.align_steps)

    def update(self, step: int, teacher: nn.Module | None) -> None:
        """Called before step ``step``: may change the teacher."""
        self.mode_update(max(0, step - self.align_steps), teacher)

    def trains_teacher_at(self, step: int) -> bool:
        """Whether the teacher takes an optimiser step of its own at the student's step ``step``."""
        return step >= self.align_steps and self.mode_trains_teacher(step - self.align_steps)

    # What a mode is: the same three, by the step since the end of slot alignment.

    def mode_weights(self, step: int) -> LossWeights:
        raise NotImplementedError(f"{type(self).__name__} has no mode_weights()")

    def mode_update(self, step: int, teacher: nn.Module | None) -> None:
        pass

    def mode_trains_teacher(self, step: int) -> bool:
        return False

    def check(self, num_steps: int) -> None:
        """Raise ValueError, naming the key to mend, if the mode does not fit a run of ``num_steps`` steps."""
        if not 0 <= self.align_steps < num_steps:
            raise ValueError(
                f"align_steps: expected between 0 and {num_steps - 1} (num_steps is {num_steps}), got "
                f"{self.align_steps}. Use `alignment` guidance to do nothing but align"
            )

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raise ValueError, naming the key to mend, if the mode cannot follow ``teacher``."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the step; these modes are functions of the step alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


def options_of(mode: type[Guidance]) -> dict[str, bool]:
    """The options of a mode, in order, and whether each must be given.

    Example
    -------
    >>> options_of(Hybrid)["switch_step"], options_of(Hybrid)["alpha_layer"]
    (True, False)
    """
    return {f.name: f.default is MISSING for f in fields(mode) if f.init}


def derived_modes(mode: type[Guidance] = Guidance) -> Iterator[type[Guidance]]:
    """All modes that derive from one, a user's own among them."""
    for derived in mode.__subclasses__():
        yield derived
        yield from derived_modes(derived)


def every_option() -> set[str]:
    """The options of all modes, a user's own among them."""
    return set(options_of(Guidance)).union(*map(options_of, derived_modes()))


# --- modes without a teacher that is followed -----------------------------------------------------------------------


@dataclass(kw_only=True)
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


@dataclass(kw_only=True)
class Alignment(Guidance):
    """Nothing but slot alignment, to the end: converts an encoder without labels, once for many tasks.

    Example
    -------
    >>> Alignment().weights(0)
    LossWeights(task=0.0, layer=0.0, logits=0.0, slot_alignment=1.0)
    """

    align_steps: int = field(default=0, init=False)  # no option: the whole run is the mode's own

    def mode_weights(self, step: int) -> LossWeights:
        return SLOT_ALIGNMENT


# --- modes that follow one ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Target(Guidance):
    """The fine-tuned teacher, fixed, throughout.

    Arguments
    ---------
    alpha_layer : weight of the layer loss (the paper's speech recipes use 15, and 30 for VoxCeleb1).
    alpha_logits : weight of the logit loss (1 for TED-LIUM, else 0).
    alpha_task : weight of the task loss; 0 distils without labels.
    align_steps : as in :class:`Guidance`.
    """

    alpha_layer: float = option(15.0, at_least=0)
    alpha_logits: float = option(0.0, at_least=0)
    alpha_task: float = option(1.0, at_least=0)

    def mode_weights(self, step: int) -> LossWeights:
        return LossWeights(self.alpha_task, self.alpha_layer, self.alpha_logits)

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if not self.mode_weights(0).runs_student:
            raise ValueError("alpha_task, alpha_layer, alpha_logits: expected one of them above 0, got none")


@dataclass(kw_only=True)
class Hybrid(Target):
    """Target guided at first, then the task loss alone, or with the logit loss.

    Arguments
    ---------
    switch_step : so many steps are guided (40,000 of 90,000 in the paper's TED-LIUM run).
    keep_logits : True keeps the logit loss, and with it the teacher, after the switch: CALD's code does.
    alpha_layer, alpha_logits, alpha_task, align_steps : as in :class:`Target`.

    Example
    -------
    >>> mode = Hybrid(switch_step=2, alpha_layer=15.0)
    >>> [mode.weights(step).layer for step in range(4)]
    [15.0, 15.0, 0.0, 0.0]
    """

    switch_step: int = option(at_least=1)
    keep_logits: bool = False

    def mode_weights(self, step: int) -> LossWeights:
        if step < self.switch_step:
            return super().mode_weights(step)
        return LossWeights(logits=self.alpha_logits if self.keep_logits else 0.0)

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        left = num_steps - self.align_steps
        if not 0 < self.switch_step < left:
            raise ValueError(
                f"switch_step: expected between 1 and {left - 1} (num_steps is {num_steps}, of which "
                f"{self.align_steps} align), got {self.switch_step}. Use `target` guidance for no switch, `unguided` "
                "for no teacher"
            )


# --- teachers that move ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Trajectory(Target):
    """A second model is fine-tuned from the same pretrained weights in the same run, and followed as it learns.

    Arguments
    ---------
    teacher_update_every : the teacher takes one optimiser step every so many of the student's (T_u in the paper).
    teacher_update : ``first``: before the first of so many steps, so that the student follows a teacher that has seen
        its batch; ``last``, as CALD's code: after the last of them.
    teacher_learning_rate : the teacher's own, at its highest; None takes the student's. Either has the schedule's
        shape over the student's steps.
    alpha_layer, alpha_logits, alpha_task, align_steps : as in :class:`Target`.

    Example
    -------
    >>> mode = Trajectory(teacher_update_every=2)
    >>> [mode.trains_teacher_at(step) for step in range(4)]
    [True, False, True, False]
    """

    trains_teacher = True
    starts_from = "source"

    teacher_update_every: int = option(1, at_least=1)
    teacher_update: str = option("first", one_of=("first", "last"))
    teacher_learning_rate: float | None = option(None, above=0)

    @property
    def updates_last(self) -> bool:
        return self.teacher_update == "last"

    def mode_trains_teacher(self, step: int) -> bool:
        return (step + self.updates_last) % self.teacher_update_every == 0

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if not 1 <= self.teacher_update_every <= num_steps:
            raise ValueError(
                f"teacher_update_every: expected between 1 and {num_steps} (num_steps), got {self.teacher_update_every}"
            )


@dataclass(kw_only=True)
class Waypoint(Target):
    """The teacher's saved checkpoints, one after the other: at each step the next one ahead of the student.

    Arguments
    ---------
    waypoints : folder with the checkpoints ``step-<number>`` of the teacher's fine-tuning, its output_folder/waypoints.
    teacher_steps : steps of the teacher's run that go by in one step of the student's: with 2, the student's step 500
        stands beside the teacher's step 1,000.
    alpha_layer, alpha_logits, alpha_task, align_steps : as in :class:`Target`.
    """

    starts_from = "source"

    waypoints: str | Path
    teacher_steps: float = option(1.0, above=0)

    def __post_init__(self) -> None:
        self.followed: Path | None = None  # of this process: a resumed run takes its waypoint over again

    @cached_property
    def checkpoints(self) -> Waypoints:
        """Listed when the run starts: not when its yaml is read, so that a yaml can be looked at anywhere."""
        return Waypoints(self.waypoints)

    def mode_update(self, step: int, teacher: nn.Module | None) -> None:
        ahead = self.checkpoints.ahead_of(step * self.teacher_steps)
        if ahead != self.followed:
            take_over(teacher, ahead)
            self.followed = ahead

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if self.teacher_steps <= 0:
            raise ValueError(f"teacher_steps: expected more than 0, got {self.teacher_steps}")
        first, last, left = min(self.checkpoints.folders), max(self.checkpoints.folders), num_steps - self.align_steps
        if left * self.teacher_steps < first < last:
            raise ValueError(
                f"teacher_steps: {left} steps (num_steps) at {self.teacher_steps} of the teacher's each end before its "
                f"first waypoint, of step {first}, is passed: expected at least {first / left:g}, and {last / left:g} "
                "to follow it to its end"
            )

    def check_teacher(self, teacher: nn.Module) -> None:
        self.checkpoints.check_fit(teacher)
