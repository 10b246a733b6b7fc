"""Conversion: put a linear-time mixer into the attention slot of each chosen layer of a pretrained model.

What is not replaced is left as it is (feed-forward, norms, front end, head); the new mixers start at random or from
the attention weights they replace. Which layers are converted is a value, the :class:`LayerMap`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families import Family
from cald_speech.mixers import CausalMixer, MixerFactory, describe_factory, factory_from

STARTS = ("attention", "random")


@dataclass(frozen=True)
class LayerMap:
    """Which layer gets which mixer: ``default`` everywhere but in ``overrides``; None keeps attention.

    Example
    -------
    >>> from cald_speech.mixers import Mamba2
    >>> layer_map = LayerMap(Mamba2, {0: None})  # all but the first of the layers
    >>> [factory is None for factory in layer_map.factories(3)]
    [True, False, False]
    """

    default: MixerFactory | None = None
    overrides: Mapping[int, MixerFactory | None] = field(default_factory=dict)

    def factories(self, num_layers: int) -> list[MixerFactory | None]:
        """The factory of each layer, first to last. Raises UserError for an index that does not exist."""
        wrong = [i for i in self.overrides if not (isinstance(i, int) and 0 <= i < num_layers)]
        if wrong:
            raise UserError(
                f"layer_map.overrides: expected layer indices from 0 to {num_layers - 1} (the model has {num_layers} "
                f"layers), got {wrong}. Correct the indices in the yaml"
            )
        return [self.overrides.get(i, self.default) for i in range(num_layers)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for config.json."""
        described = {str(i): None if f is None else describe_factory(f) for i, f in sorted(self.overrides.items())}
        return {"default": None if self.default is None else describe_factory(self.default), "overrides": described}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerMap":
        """The inverse of :meth:`to_dict`."""
        overrides = {int(i): None if f is None else factory_from(f) for i, f in data["overrides"].items()}
        return cls(None if data["default"] is None else factory_from(data["default"]), overrides)


def type_name(factory: MixerFactory | None) -> str:
    """The mixer's class name, or ``attention`` for a kept layer."""
    return "attention" if factory is None else describe_factory(factory)["mixer"]


@dataclass(frozen=True)
class ConversionReport:
    """Every parameter of the converted model by where its values come from, and what went with the attention."""

    layers: tuple[str, ...]  # mixer class, or "attention", of each layer
    untouched: tuple[str, ...]  # the pretrained model's own
    copied: tuple[str, ...]  # in new mixers, holding attention weights
    new: tuple[str, ...]  # in new mixers, as the mixer initialised them
    removed: tuple[str, ...]  # parameters of the original model that are gone
    num_parameters_before: int
    num_parameters_after: int

    @classmethod
    def of(cls, model: PreTrainedModel, family: Family) -> "ConversionReport":
        """Of a model that is as it is: nothing is new or removed."""
        mixers = [family.mixer(layer) for layer in family.layers(model)]
        count = sum(p.numel() for p in model.parameters())
        return cls(
            layers=tuple("attention" if mixer is None else type(mixer).__name__ for mixer in mixers),
            untouched=tuple(sorted(name for name, _ in model.named_parameters())),
            copied=(),
            new=(),
            removed=(),
            num_parameters_before=count,
            num_parameters_after=count,
        )

    def describe_layers(self) -> str:
        """One line for people: ``24 of 24 layers converted: Bidirectional``."""
        kinds = sorted(set(self.layers) - {"attention"})
        converted = sum(name != "attention" for name in self.layers)
        return f"{converted} of {len(self.layers)} layers converted" + (f": {', '.join(kinds)}" if kinds else "")

    def __str__(self) -> str:
        ratio = self.num_parameters_after / self.num_parameters_before
        return (
            f"layers: {', '.join(self.layers)}\n"
            f"parameters: {self.num_parameters_before:,} before, {self.num_parameters_after:,} after ({ratio:.3f}x)\n"
            f"tensors: {len(self.untouched)} untouched, {len(self.copied)} copied from attention, {len(self.new)} new, "
            f"{len(self.removed)} removed"
        )


def convert(
    model: PreTrainedModel, family: Family, layer_map: LayerMap, *, initialise: str = "attention"
) -> ConversionReport:
    """Convert ``model`` in place, and make it a model of the converted class, which saves and loads as such.

    Arguments
    ---------
    model : a model of ``family`` with attention in every layer.
    layer_map : which layer gets which mixer. A map without any mixer leaves the model as it is.
    initialise : ``attention`` starts each mixer from the weights it replaces where it can, ``random`` does not.

    Raises
    ------
    UserError
        for a layer that does not exist, a mixer that would see the future in a causal model, or one whose geometry does
        not allow a start from the attention weights.

    Example
    -------
    >>> from transformers import Wav2Vec2Config
    >>> from cald_speech.families import families
    >>> from cald_speech.mixers import Bidirectional
    >>> config = Wav2Vec2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    ...     conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    >>> family = families()["wav2vec2"]
    >>> report = convert(family.load(config), family, LayerMap(Bidirectional, {1: None}))
    >>> report.layers
    ('Bidirectional', 'attention')
    """
    from cald_speech.checkpoints import adopt  # it builds its classes with this function

    if initialise not in STARTS:
        raise UserError(f"initialise: expected one of {', '.join(STARTS)}, got {initialise!r}")
    before = {name: p.numel() for name, p in model.named_parameters()}
    factories = layer_map.factories(len(family.layers(model)))
    copied = replace_layers(model, family, factories, initialise=initialise)
    after = {name: p.numel() for name, p in model.named_parameters()}
    in_mixers = {name for name in after if ".mixer." in name}
    if any(factories):
        adopt(model, family, layer_map)
    return ConversionReport(
        layers=tuple(type_name(f) for f in factories),
        untouched=tuple(sorted(after.keys() - in_mixers)),
        copied=tuple(sorted(copied)),
        new=tuple(sorted(in_mixers - copied)),
        removed=tuple(sorted(before.keys() - after.keys())),
        num_parameters_before=sum(before.values()),
        num_parameters_after=sum(after.values()),
    )


def replace_layers(
    model: PreTrainedModel, family: Family, factories: list[MixerFactory | None], *, initialise: str
) -> set[str]:
    """Put the mixers in; returns the names of the parameters that now hold attention weights."""
    family.prepare(model)
    if family.causal:
        check_causal(family, factories)
    held, firsts = {}, {}
    for index, factory in enumerate(factories):
        if factory is None:
            continue
        layer = family.layers(model)[index]
        weights = family.attention_weights(model, layer)
        heads, _, d_model = weights.q.shape
        try:
            with torch.device(weights.q.device):
                mixer = factory(d_model, heads)
        except (TypeError, ValueError) as error:
            raise UserError(f"layer_map: cannot build the mixer of layer {index}: {error}") from error
        mixer.to(weights.q.dtype)
        if initialise == "attention":
            try:
                held[mixer] = mixer.init_from_attention(weights)
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
                "that are to be predicted. Expected a causal mixer (Mamba, Mamba2, GatedLinearAttention, without "
                "Bidirectional around it), or None to keep the attention"
            )
