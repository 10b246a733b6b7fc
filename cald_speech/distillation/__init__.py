"""Cross-Architecture Layerwise Distillation: losses on hidden states and logits, and guidance (floor F4).

It sees tensors only; loading a model is never its business.
"""

from cald_speech.distillation.guidance import (
    Alignment,
    Guidance,
    Hybrid,
    LossWeights,
    Target,
    Trajectory,
    Unguided,
    Waypoint,
    derived_modes,
    every_option,
    options_of,
)
from cald_speech.distillation.losses import (
    PRESETS,
    LossForm,
    layer_distances,
    logit_loss,
    reduce_layers,
)
from cald_speech.distillation.states import captured_slots, captured_states

__all__ = [
    "PRESETS",
    "Alignment",
    "Guidance",
    "Hybrid",
    "LossForm",
    "LossWeights",
    "Target",
    "Trajectory",
    "Unguided",
    "Waypoint",
    "captured_slots",
    "captured_states",
    "derived_modes",
    "every_option",
    "layer_distances",
    "logit_loss",
    "options_of",
    "reduce_layers",
]
