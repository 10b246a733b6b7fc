"""Pretrained architectures, one file each (floor F2). A new file with a ``FAMILY`` in it is found by itself.

``base.py`` has what every family knows, ``speech.py`` and ``text.py`` what the two kinds add: :class:`SpeechFamily` and
:class:`TextFamily`.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

from transformers import PretrainedConfig, PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families.base import Family, Opened
from cald_speech.families.front_end import FrontEnd, Moments
from cald_speech.families.nearest import unknown
from cald_speech.families.speech import BlockAttention, SpeechFamily
from cald_speech.families.text import TextFamily

Kind = TypeVar("Kind", bound=Family)


@cache
def families() -> dict[str, Family]:
    """Every family by its Hugging Face ``model_type``.

    Example
    -------
    >>> sorted(name for name in families() if name.startswith("wav"))
    ['wav2vec2', 'wav2vec2-bert', 'wav2vec2-conformer', 'wavlm']
    """
    modules = [import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)]
    found = [vars(module)["FAMILY"] for module in modules if "FAMILY" in vars(module)]
    return {family.model_type: family for family in found}


def family_of(model: PreTrainedModel | PretrainedConfig, kind: type[Kind] = Family) -> Kind:
    """The family of a model or config, converted ones included.

    Arguments
    ---------
    model : whose family it is.
    kind : :class:`SpeechFamily` or :class:`TextFamily`, where the caller can do with this kind alone.

    Raises
    ------
    UserError
        for an architecture not known here, which names the nearest that is, and for one of the other kind.

    Example
    -------
    >>> from transformers import HubertConfig
    >>> family_of(HubertConfig(), SpeechFamily).model_type
    'hubert'
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    for family in families().values():
        if isinstance(config, family.config_class):
            if not isinstance(family, kind):
                raise UserError(kind.refusal.format(got=type(model).__name__, model_type=family.model_type))
            return family
    raise unknown(config.model_type, families())


__all__ = [
    "BlockAttention",
    "Family",
    "FrontEnd",
    "Moments",
    "Opened",
    "SpeechFamily",
    "TextFamily",
    "families",
    "family_of",
]
