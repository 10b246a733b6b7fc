"""The layer map: which layer gets which mixer.

``None`` keeps the attention: hybrid models and stepwise conversion are values of the map, not other code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cald_speech.errors import UserError
from cald_speech.mixers import MixerFactory, describe_factory, factory_from


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
        """The inverse of :meth:`to_dict`; raises ValueError for what it would not have written."""
        layers = data.get("overrides")
        if not {"default", "overrides"} <= data.keys() or not isinstance(layers, Mapping):
            raise ValueError(f"expected the keys default and overrides, with a mixer or null for each, got {[*data]}")
        if wrong := [i for i in layers if not str(i).isdecimal() or len(str(i)) > 6]:
            raise ValueError(f"overrides: expected layers by their numbers, got {wrong[0]!r:.60}")
        overrides = {int(i): None if f is None else factory_from(f) for i, f in layers.items()}
        return cls(None if data["default"] is None else factory_from(data["default"]), overrides)


def type_name(factory: MixerFactory | None) -> str:
    """The mixer's class name, or ``attention`` for a kept layer."""
    return "attention" if factory is None else describe_factory(factory)["mixer"]
