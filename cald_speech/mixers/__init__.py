"""Token mixers, the linear-time modules that take self-attention's place in a layer (floor F1).

``base.py`` says what a mixer is, ``scan.py`` what one that scans is made of, ``attention_heads.py`` what one that is
still attention is, ``averages.py`` how averages over some keys are put together, ``factory.py`` how one stands in a
yaml and in a model's config. Every other file is one mixer.
"""

from functools import partial

from cald_speech.mixers.base import AttentionWeights, DistanceKeys, Mixer, MixerFactory, PositionBias, Sweep
from cald_speech.mixers.bidirectional import Bidirectional
from cald_speech.mixers.factory import check_options, describe_factory, factory_classes, factory_from
from cald_speech.mixers.gated_delta_net import GatedDeltaNet
from cald_speech.mixers.gated_linear_attention import GatedLinearAttention
from cald_speech.mixers.hydra import Hydra
from cald_speech.mixers.linformer import Linformer
from cald_speech.mixers.mamba import Mamba
from cald_speech.mixers.mamba2 import Mamba2
from cald_speech.mixers.normalised_linear_attention import NormalisedLinearAttention
from cald_speech.mixers.scan import SCAN_PARAMETERS, CausalMixer
from cald_speech.mixers.windowed_attention import WindowedAttention

DEFAULT = partial(Bidirectional, mixer=Mamba2, share_projections=True)
"""The mixer of a conversion that names none: docs/results/mixers.md says why. A causal model gets its ``mixer``."""

__all__ = [
    "DEFAULT",
    "SCAN_PARAMETERS",
    "AttentionWeights",
    "Bidirectional",
    "CausalMixer",
    "DistanceKeys",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "Hydra",
    "Linformer",
    "Mamba",
    "Mamba2",
    "Mixer",
    "MixerFactory",
    "NormalisedLinearAttention",
    "PositionBias",
    "Sweep",
    "WindowedAttention",
    "check_options",
    "describe_factory",
    "factory_classes",
    "factory_from",
]
