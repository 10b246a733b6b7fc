"""A student that is converted a group of layers at a time, at the steps of a ``conversion_schedule``.

The model is at every moment what it says it is: its layer map has the layers that are converted by then, and a folder
of it loads. So a run that was stopped goes on from whatever its newest checkpoint holds.
"""

from dataclasses import replace

from transformers import PreTrainedModel

from cald_speech.conversion import ConversionReport, ConversionSchedule, LayerMap, convert, converted_before
from cald_speech.errors import UserError
from cald_speech.families import family_of
from cald_speech.training.settings import Settings


class StepwiseConversion:
    """What is converted before each step, of a student that has attention in every layer.

    Without a schedule that is everything, before the first.

    Raises
    ------
    UserError
        for a schedule that does not fit the rest of the experiment.
    """

    def __init__(self, settings: Settings, student: PreTrainedModel):
        self.layer_map, self.initialise, self.student = settings.layer_map, settings.initialise, student
        self.num_layers = len(family_of(student).layers(student))
        self.num_parameters = sum(p.numel() for p in student.parameters())
        self.steps: tuple[int, ...] = (0,)
        self.groups: list[tuple[int, ...]] = []
        if (schedule := settings.conversion_schedule) is not None:
            if not isinstance(schedule, ConversionSchedule):
                raise UserError(
                    "conversion_schedule: expected `!new:cald_speech.conversion.ConversionSchedule` with steps and an "
                    f"order, got {schedule!r}"
                )
            factories = self.layer_map.factories(self.num_layers)
            layers = [layer for layer, factory in enumerate(factories) if factory is not None]
            self.groups = schedule.groups(layers)
            self.steps = tuple(schedule.steps)
            self._check(settings)

    def is_due(self, step: int) -> bool:
        """Whether a group is converted before the optimiser step ``step``, and not before any other."""
        return bool(self.groups) and step in self.steps

    def convert_for(self, step: int) -> ConversionReport:
        """Have everything converted that step ``step`` is taken with; the report counts from the original model."""
        report = convert(self.student, self._map_at(step), initialise=self.initialise)
        return replace(report, num_parameters_before=self.num_parameters)

    def _map_at(self, step: int) -> LayerMap:
        if not self.groups:
            return self.layer_map
        done = [group for start, group in zip(self.steps, self.groups, strict=True) if start <= step]
        return converted_before(self.layer_map, done, self.num_layers)

    def _check(self, settings: Settings) -> None:
        if self.steps[-1] >= settings.num_steps:
            raise UserError(
                f"conversion_schedule.steps: expected steps below num_steps, {settings.num_steps}, so that the model "
                f"is converted when the run ends, got {self.steps[-1]}"
            )
        if settings.calibrate:
            raise UserError(
                "calibrate: expected layers that are all converted before the first step, got a conversion_schedule. "
                "Leave one of the two out"
            )
        if settings.guidance.align_steps and self.steps[0] > 0:
            raise UserError(
                "conversion_schedule.steps: expected the first at 0, since align_steps trains mixers alone and there "
                f"would be none, got {self.steps[0]}"
            )
