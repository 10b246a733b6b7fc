"""Pretrained architectures, one file each (floor F2). A new file with a ``FAMILY`` in it is found by itself."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from transformers import PretrainedConfig, PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families.base import Family, Opened
from cald_speech.families.block_attention import BlockAttention
from cald_speech.families.front_end import FrontEnd, Moments


@cache
def families() -> dict[str, Family]:
    """Every family by its Hugging Face ``model_type``.

    Example
    -------
    >>> sorted(families())
    ['bert', 'gpt_neox', 'hubert', 'llama', 'roberta', 'wav2vec2', 'wavlm']
    """
    modules = [import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)]
    found = [vars(module)["FAMILY"] for module in modules if "FAMILY" in vars(module)]
    return {family.model_type: family for family in found}


def family_of(model: PreTrainedModel | PretrainedConfig) -> Family:
    """The family of a model or config, converted ones included. Raises UserError for an architecture not known here."""
    config = model.config if isinstance(model, PreTrainedModel) else model
    for family in families().values():
        if isinstance(config, family.config_class):
            return family
    raise UserError(
        f"the architecture {config.model_type!r} is not known: expected one of {', '.join(sorted(families()))}. "
        "CONTRIBUTING.md tells how to add a family"
    )


__all__ = ["BlockAttention", "Family", "FrontEnd", "Moments", "Opened", "families", "family_of"]
