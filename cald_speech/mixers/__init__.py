"""Token mixers, the linear-time modules that take self-attention's place in a layer (floor F1)."""

from cald_speech.mixers.base import SCAN_PARAMETERS, AttentionWeights, CausalMixer, Mixer, MixerFactory, Sweep
from cald_speech.mixers.bidirectional import Bidirectional
from cald_speech.mixers.factory import describe_factory, factory_from
from cald_speech.mixers.mamba2 import Mamba2

__all__ = [
    "SCAN_PARAMETERS",
    "AttentionWeights",
    "Bidirectional",
    "CausalMixer",
    "Mamba2",
    "Mixer",
    "MixerFactory",
    "Sweep",
    "describe_factory",
    "factory_from",
]
