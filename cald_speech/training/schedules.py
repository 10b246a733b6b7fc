"""Learning-rate schedules: functions of the optimiser step alone, so there is no state to save."""

import math
from dataclasses import dataclass

from cald_speech.distillation.options import check_values, option

SHAPES = ("constant", "linear", "cosine", "clamped_cosine", "exponential")


@dataclass(frozen=True)
class WarmupSchedule:
    """Linear warm-up to 1, then down to ``floor`` over the ``decay_steps`` that follow.

    Arguments
    ---------
    warmup_steps : steps until the factor is 1.
    decay_steps : steps from there to ``floor``; it stays there afterwards.
    shape : ``constant`` (no decay), ``linear``, ``cosine``, ``exponential``, or ``clamped_cosine``, which goes to 0 and
        is never less than ``floor``.
    floor : the last factor; above 0 for ``exponential``.

    Example
    -------
    >>> schedule = WarmupSchedule(warmup_steps=2, decay_steps=4, shape="linear")
    >>> [round(schedule(step), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    warmup_steps: int = option(0, at_least=0)
    decay_steps: int = option(1, at_least=0)
    shape: str = option("constant", one_of=SHAPES)
    floor: float = option(0.0, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_values(self, "schedule.")
        if self.shape == "exponential" and not 0 < self.floor <= 1:
            raise ValueError(f"schedule.floor: an exponential decay needs a floor in (0, 1], got {self.floor}")

    def __call__(self, step: int) -> float:
        """The factor on the learning rate at optimiser step ``step`` (0 for the first)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.decay_steps))
        shapes = {
            "constant": lambda: 1.0,
            "linear": lambda: 1 - (1 - self.floor) * done,
            "cosine": lambda: self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)),
            "clamped_cosine": lambda: max(self.floor, 0.5 * (1 + math.cos(math.pi * done))),
            "exponential": lambda: self.floor**done,
        }
        return shapes[self.shape]()
