"""Guidance: at each optimiser step, whether a teacher is followed, how strongly, and whether it trains along.

One class a mode (He & Garner, arXiv 2410.06846, section 3); trajectory and waypoint guidance have their place here.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LossWeights:
    """The weights of the loss terms at one step: ``task * T + layer * L + logits * K``."""

    task: float = 1.0
    layer: float = 0.0
    logits: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        return self.layer > 0 or self.logits > 0


class Guidance:
    """Base of the modes. A mode without a teacher never loads one.

    ``needs_teacher`` says whether any step follows a teacher, ``trains_teacher`` whether the teacher is fine-tuned in
    the same run, ``starts_from`` which weights the student takes over: the fine-tuned ``teacher``'s, or those of the
    pretrained ``source`` where one is given.
    """

    needs_teacher = True
    trains_teacher = False
    starts_from = "teacher"

    def weights(self, step: int) -> LossWeights:
        """The loss weights of optimiser step ``step`` (0 for the first)."""
        raise NotImplementedError(f"{type(self).__name__} has no weights()")

    def update(self, step: int, teacher: Any) -> bool:
        """Called before step ``step``: may change the teacher, and says whether it did."""
        return False

    def check(self, num_steps: int) -> None:
        """Raise ValueError, naming the key to mend, if the mode does not fit a run of ``num_steps`` steps."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the step; these modes are functions of the step alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


class Unguided(Guidance):
    """The task loss alone.

    Example
    -------
    >>> Unguided().weights(0)
    LossWeights(task=1.0, layer=0.0, logits=0.0)
    """

    needs_teacher = False
    starts_from = "source"

    def weights(self, step: int) -> LossWeights:
        return LossWeights()


class Target(Guidance):
    """The fine-tuned teacher, fixed, throughout.

    Arguments
    ---------
    layer : weight of the layer loss (alpha_layer; the paper's speech recipes use 15, and 30 for VoxCeleb1).
    logits : weight of the logit loss (alpha_logits; 1 for TED-LIUM, else 0).
    task : weight of the task loss; 0 distils without labels.
    """

    def __init__(self, layer: float = 15.0, logits: float = 0.0, task: float = 1.0):
        self.target = LossWeights(task, layer, logits)

    def weights(self, step: int) -> LossWeights:
        return self.target


class Hybrid(Target):
    """Target guided for ``switch_step`` steps, then the task loss alone.

    Example
    -------
    >>> mode = Hybrid(switch_step=2, layer=15.0)
    >>> [mode.weights(step).layer for step in range(4)]
    [15.0, 15.0, 0.0, 0.0]
    """

    def __init__(self, switch_step: int, layer: float = 15.0, logits: float = 0.0, task: float = 1.0):
        super().__init__(layer, logits, task)
        self.switch_step = switch_step

    def weights(self, step: int) -> LossWeights:
        return self.target if step < self.switch_step else LossWeights()

    def check(self, num_steps: int) -> None:
        if not 0 < self.switch_step < num_steps:
            raise ValueError(
                f"guidance.switch_step: expected between 1 and {num_steps - 1} (num_steps is {num_steps}), got "
                f"{self.switch_step}. Use `target` guidance for no switch, `unguided` for no teacher"
            )
