"""Guidance by a teacher that moves: one that is fine-tuned in the same run, or its checkpoints one after the other."""

from functools import cached_property
from pathlib import Path

from torch import nn

from cald_speech.distillation.guidance import Target
from cald_speech.distillation.waypoints import Waypoints, take_over


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
