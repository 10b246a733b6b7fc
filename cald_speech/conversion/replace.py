"""Replacing: a mixer in the place of each chosen layer's attention, started from the weights that stood there.

It is below both ways to a converted model: :func:`~cald_speech.conversion.convert` replaces in a pretrained model, and
the converted classes replace in a model that is being built to load a folder into it.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from cald_speech.conversion.layer_map import type_name
from cald_speech.errors import UserError
from cald_speech.families import Family
from cald_speech.mixers import AttentionWeights, CausalMixer, Mixer, MixerFactory, check_options, describe_factory

# What sets a mixer's parameters by the attention that stood in its place, and returns the names of those that it set.
Start = Callable[[Mixer, AttentionWeights], frozenset[str]]


def start_from_attention(mixer: Mixer, weights: AttentionWeights) -> frozenset[str]:
    """The mixer's own start."""
    return mixer.init_from_attention(weights)


# By the name that an experiment gives it; None leaves a mixer as it was made.
STARTS: dict[str, Start | None] = {"attention": start_from_attention, "random": None}


def replace_layers(
    model: PreTrainedModel, family: Family, factories: list[MixerFactory | None], *, start: Start | None = None
) -> set[str]:
    """Put the mixers in; returns the names of the parameters that now hold attention weights.

    A layer that is converted already keeps its mixer. ``start`` is one of :data:`STARTS`.
    """
    family.prepare(model)
    if family.causal:
        check_causal(family, factories)
    held, firsts = {}, {}
    before = {index: mixer for index, layer in enumerate(family.layers(model)) if (mixer := family.mixer(layer))}
    for index, mixer in before.items():
        if factories[index] is not None:
            firsts.setdefault(repr(describe_factory(factories[index])), mixer)
    for index, factory in enumerate(factories):
        if factory is None or index in before:
            continue
        layer = family.layers(model)[index]
        weights = family.attention_weights(model, layer)
        heads, _, d_model = weights.q.shape
        try:
            check_options(factory)
            with torch.device(weights.q.device):
                mixer = factory(d_model, heads)
        except (TypeError, ValueError) as error:
            raise UserError(f"layer_map: cannot build the mixer of layer {index}: {error}") from error
        mixer.to(weights.q.dtype)
        if start is not None:
            try:
                held[mixer] = start(mixer, weights)
            except ValueError as error:
                raise UserError(f"layer {index}: {error} (initialise: random)") from error
        first = firsts.setdefault(repr(describe_factory(factory)), mixer)
        if first is not mixer:
            mixer.share_with(first)
        family.replace_attention(model, index, mixer)
    return {f"{place}.{name}" for place, module in model.named_modules() for name in held.get(module, ())}


def check_causal(family: Family, factories: list[MixerFactory | None]) -> None:
    """Raise UserError where a mixer would let a causal model's layer see what comes after a frame."""
    for index, factory in enumerate(factories):
        name = type_name(factory)  # raises for what is no mixer
        mixer_class = factory.func if isinstance(factory, partial) else factory
        if mixer_class is not None and not issubclass(mixer_class, CausalMixer):
            raise UserError(
                f"layer_map: {family.model_type} models are causal, and in layer {index} {name} would see the tokens "
                "that are to be predicted. Expected a causal mixer (Mamba, Mamba2, GatedLinearAttention, "
                "GatedDeltaNet, without Bidirectional around it), or None to keep the attention"
            )
