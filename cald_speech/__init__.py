"""Convert pretrained transformers to linear-time models while fine-tuning them (CALD, arXiv 2410.06846).

The names in :data:`PUBLIC` are the public surface; everything else is free to move. Each is imported when it is first
asked for: importing the package itself loads neither torch nor transformers, so that ``cald-speech --help`` answers at
once.

It does one thing more. A converted model's folder has a ``model_type`` of its own, which transformers must be told of
before ``AutoModelForCTC.from_pretrained(folder)`` or ``pipeline(model=folder)`` can read it. All of them ask
``AutoConfig`` first: its first use after ``import cald_speech`` imports :mod:`cald_speech.conversion`, whose import
registers the converted classes. Where ``AutoConfig`` is not imported yet, a finder waits for it. Registering at that
import would be too early: transformers imports it in the middle of the very modules that the classes are made of.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401
if TYPE_CHECKING:  # for type checkers and the API pages; a test keeps it equal to PUBLIC
    from cald_speech.conversion import ConversionReport, LayerMap, convert, from_pretrained
    from cald_speech.longform import transcribe
    from cald_speech.mixers import (
        Bidirectional,
        GatedDeltaNet,
        GatedLinearAttention,
        Hydra,
        Linformer,
        Mamba,
        Mamba2,
        NormalisedLinearAttention,
        WindowedAttention,
    )

PUBLIC = {
    # From a pretrained model to a converted one, and back from its folder.
    "convert": "cald_speech.conversion",
    "LayerMap": "cald_speech.conversion",
    "ConversionReport": "cald_speech.conversion",
    "from_pretrained": "cald_speech.conversion",
    # What a converted model is for.
    "transcribe": "cald_speech.longform",
    # What a layer map can put in attention's place.
    "Mamba2": "cald_speech.mixers",
    "Mamba": "cald_speech.mixers",
    "GatedLinearAttention": "cald_speech.mixers",
    "GatedDeltaNet": "cald_speech.mixers",
    "Bidirectional": "cald_speech.mixers",
    "Hydra": "cald_speech.mixers",
    "NormalisedLinearAttention": "cald_speech.mixers",
    "Linformer": "cald_speech.mixers",
    "WindowedAttention": "cald_speech.mixers",
}
"""Every public name, and the module that it is imported from."""

__version__ = "0.1.0"
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})


_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _register_on_first_use(module: ModuleType) -> None:
    """Let the first call of ``AutoConfig`` import what registers the converted classes, and then go on as ever."""
    auto_config = module.AutoConfig
    own = {name: vars(auto_config)[name] for name in ("from_pretrained", "for_model")}

    def first(name: str) -> Callable[..., Any]:
        def call(cls: type, *args: Any, **kwargs: Any) -> Any:
            for each, method in own.items():
                setattr(auto_config, each, method)
            import_module("cald_speech.conversion")
            return getattr(cls, name)(*args, **kwargs)

        call.__doc__ = getattr(auto_config, name).__doc__
        return call

    for name in own:
        setattr(auto_config, name, classmethod(first(name)))


class _AutoConfigFinder(MetaPathFinder):
    """Finds nothing of its own; lets the import of AutoConfig, once, end with :func:`_register_on_first_use`."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_then(module: ModuleType) -> None:
            spec.loader.exec_module = execute
            execute(module)
            _register_on_first_use(module)

        spec.loader.exec_module = execute_then
        return spec


if _AUTO_CONFIG in sys.modules:
    _register_on_first_use(sys.modules[_AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _AutoConfigFinder())
