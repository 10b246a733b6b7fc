"""The same SpecAugment mask for two models: what the student does not hear, its teacher does not hear either."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn
from transformers import PreTrainedModel

KEYS = ("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks")
KEYS += ("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks")


class SharedMasks:
    """Lets ``teacher`` draw the mask that ``student`` drew last, though nothing else of it is in training mode.

    Hugging Face's speech encoders draw their masks from NumPy's global generator, by the settings in their config: with
    the student's settings and the generator put back, the teacher draws the same.

    Example
    -------
    >>> masks = SharedMasks(teacher, student)  # doctest: +SKIP
    >>> masks.remember()  # doctest: +SKIP
    >>> student(audio)  # doctest: +SKIP
    >>> with masks.drawn_again():  # doctest: +SKIP
    ...     teacher(audio)
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel):
        self.teacher, self.state = teacher.base_model, None
        for key in KEYS:
            setattr(self.teacher.config, key, getattr(student.base_model.config, key))
        embedding = student.base_model._parameters.get("masked_spec_embed")
        # A teacher that was made without masking has no vector to put in a masked frame's place.
        if embedding is not None and "masked_spec_embed" not in self.teacher._parameters:
            self.teacher.masked_spec_embed = nn.Parameter(embedding.detach().clone(), requires_grad=False)

    def remember(self) -> None:
        """To be called before the student's forward pass."""
        self.state = np.random.get_state()

    @contextmanager
    def drawn_again(self) -> Iterator[None]:
        """Inside, the teacher's encoder masks what the student's masked; the generator then goes on where it was."""
        present = np.random.get_state()
        np.random.set_state(self.state)
        self.teacher.training = True  # of the encoder alone: its layers, and their dropout, stay in evaluation mode
        try:
            yield
        finally:
            self.teacher.training = False
            np.random.set_state(present)
