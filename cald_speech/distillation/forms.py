"""The form of CALD's distillation terms: one set of options, and the published code's three settings of it.

The reference has a copy of the losses for each of its tasks, with other layers, norms, masks and scales; here they are
values. tests/training/test_reference.py holds them against a literal evaluation of what the reference computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# What a sum over one batch is divided by: see :attr:`LossForm.normalisation`.
NORMALISATIONS = ("per_frame", "reference")


@dataclass(frozen=True)
class LossForm:
    """Which states are compared, how, and what the sums are divided by.

    Arguments
    ---------
    distance, normalise : as in :func:`cald_speech.distillation.layer_distances`.
    layers, reduce : weight of each compared state, and how they are brought together: see ``layerwise_loss``.
    embedding : True compares the input of the first layer too, as the first of the states.
    last : False leaves the last layer's states out.
    final_norm : True compares the last layer's states after the model's final norm.
    masked : False counts padded frames like any other.
    temperature, scale_by_t2, blank_weight : as in :func:`cald_speech.distillation.logit_loss`.
    by_characters : in the reference's normalisation, True weighs each accumulated batch by its share of the step's
        label characters (speech); False takes each batch's own mean, divided by the number of batches (text).

    Example
    -------
    >>> PRESETS["lm"].num_states(num_layers=16)
    15
    """

    distance: str = "squared"
    normalise: str = "layer_norm"
    layers: Sequence[float] | None = None
    reduce: str = "mean"
    embedding: bool = False
    last: bool = True
    final_norm: bool = True
    masked: bool = True
    temperature: float = 2.0
    scale_by_t2: bool = False
    blank_weight: float = 1.0
    by_characters: bool = True

    def num_states(self, num_layers: int) -> int:
        """How many states of a model with so many layers are compared."""
        return num_layers + self.embedding - (not self.last)


# The reference's three (arXiv 2410.06846; speech/models/model.py, lm/open_instruct/train_utils.py and
# nlp/run_glue_linformer.py of its code).
PRESETS = {
    "speech": LossForm(),
    "lm": LossForm(last=False, final_norm=False, masked=False, by_characters=False),
    "nlp": LossForm(
        normalise="none",
        reduce="sum",
        embedding=True,
        final_norm=False,
        masked=False,
        scale_by_t2=True,
        by_characters=False,
    ),
}
