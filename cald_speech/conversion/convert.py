"""Conversion: put a linear-time mixer into the attention slot of each chosen layer of a pretrained model.

What is not replaced is left as it is (feed-forward, norms, front end, head); the new mixers start at random or from
the attention weights they replace. Which layers are converted is a value, the layer map.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from cald_speech.conversion.classes import adopt, config_class
from cald_speech.conversion.layer_map import LayerMap, type_name
from cald_speech.conversion.replace import STARTS, replace_layers
from cald_speech.errors import UserError
from cald_speech.families import Family, family_of
from cald_speech.mixers import MixerFactory, describe_factory


def convert(model: PreTrainedModel, layer_map: LayerMap, *, initialise: str = "attention") -> "ConversionReport":
    """Convert ``model`` in place, and make it a model of the converted class, which saves and loads as such.

    Arguments
    ---------
    model : of an architecture known to ``cald_speech.families``. Layers that are converted already stay as they are.
    layer_map : which layer gets which mixer. A map without any mixer leaves the model as it is.
    initialise : ``attention`` starts each mixer from the weights it replaces where it can, ``random`` does not.

    Returns
    -------
    Which parameters are new, copied, untouched and gone; printed, a summary.

    Raises
    ------
    UserError
        for an architecture not known here, a layer that does not exist, a mixer that would see the future in a causal
        model, or one whose geometry does not allow a start from the attention weights; for a layer that is converted
        already, and has another mixer than in the map.

    Example
    -------
    >>> from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
    >>> from cald_speech.mixers import Bidirectional
    >>> config = Wav2Vec2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    ...     conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    >>> report = convert(Wav2Vec2ForCTC(config), LayerMap(Bidirectional, {1: None}))
    >>> report.layers
    ('Bidirectional', 'attention')
    """
    family = family_of(model)
    if initialise not in STARTS:
        raise UserError(f"initialise: expected one of {', '.join(STARTS)}, got {initialise!r}")
    before = {name: p.numel() for name, p in model.named_parameters()}
    factories = layer_map.factories(len(family.layers(model)))
    check_converted(model, family, factories)
    copied = replace_layers(model, family, factories, start=STARTS[initialise])
    after = {name: p.numel() for name, p in model.named_parameters()}
    in_mixers = {name for name in after.keys() - before.keys() if ".mixer." in name}
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


def check_converted(model: PreTrainedModel, family: Family, factories: list[MixerFactory | None]) -> None:
    """Raise UserError unless each layer that is converted already has the mixer that it is to have."""
    if not isinstance(model.config, config_class(family)):
        return
    before = LayerMap.from_dict(model.config.layer_map).factories(len(factories))
    for index, (old, new) in enumerate(zip(before, factories, strict=True)):
        if old is not None and (new is None or describe_factory(old) != describe_factory(new)):
            raise UserError(
                f"layer_map: layer {index} is converted already, and has {type_name(old)}: expected the same mixer, "
                f"with the same options, got {type_name(new)}. Convert the original model instead"
            )


@dataclass(frozen=True)
class SlotFit:
    """How near a slot's mixer comes to the attention that it replaces, on audio that nothing was fitted to.

    ``error`` is the squared distance over the spread of what attention puts out, which the mean of that has as 1, and
    ``norm`` the ratio of both outputs' norms, which shrinking to the mean makes small; each before calibration and
    after it. ``changed`` says in words what calibration set.
    """

    layer: int
    mixer: str
    error: tuple[float, float]
    norm: tuple[float, float]
    changed: str

    def __str__(self) -> str:
        error, norm = (f"{before:.3f} to {after:.3f}" for before, after in (self.error, self.norm))
        return f"layer {self.layer}, {self.mixer}: error {error}, norm {norm}; {self.changed}"


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
    slots: tuple[SlotFit, ...] = ()  # where the model was calibrated

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ConversionReport":
        """Of a model that is as it is: nothing is new or removed."""
        family = family_of(model)
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

    def facts(self) -> dict[str, str]:
        """What every model card says of the model itself."""
        return {
            "layers": self.describe_layers(),
            "parameters": f"{self.num_parameters_after:,} ({self.num_parameters_before:,} before)",
        }

    def __str__(self) -> str:
        ratio = self.num_parameters_after / self.num_parameters_before
        return (
            f"layers: {', '.join(self.layers)}\n"
            f"parameters: {self.num_parameters_before:,} before, {self.num_parameters_after:,} after ({ratio:.3f}x)\n"
            f"tensors: {len(self.untouched)} untouched, {len(self.copied)} copied from attention, {len(self.new)} new, "
            f"{len(self.removed)} removed" + self._calibrated()
        )

    def _calibrated(self) -> str:
        if not self.slots:
            return ""
        title = "slots on held-out audio, before and after calibration (the mean of attention's output has error 1)"
        return "\n".join(["", f"{title}:", *map(str, self.slots)])
