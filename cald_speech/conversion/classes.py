"""Converted models as Hugging Face classes and folders.

A converted model has a ``model_type`` and a class of its own, whose ``__init__`` builds the base model and converts it.
In a folder that said ``wav2vec2``, transformers alone would load random attention and only mention it; with
``cald_wav2vec2`` it fails loudly, or asks whether it may run the folder's own file (``modeling_file.py``). After
``import cald_speech`` the Auto classes and ``pipeline`` work.

A converted class is called ``Cald`` and its base class's name: ``CaldWav2Vec2ForCTC`` is ``Wav2Vec2ForCTC`` with
mixers. No file has a ``class`` line for it. :func:`converted_class` makes it, its config's class comes from
:func:`config_class`, and :func:`register` makes those of every family; each file in ``families/`` names its own.
"""

import copy
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor
from transformers.utils import PushToHubMixin

from cald_speech.conversion.converted import declare_shared, make_config_class, make_model_class
from cald_speech.conversion.int8 import INT8, in_int8
from cald_speech.conversion.layer_map import LayerMap
from cald_speech.conversion.modeling_file import ConvertedConfig, ConvertedModel
from cald_speech.errors import UserError
from cald_speech.families import Family, families, family_of
from cald_speech.families.hub import read_config
from cald_speech.families.languages import speak


@cache
def config_class(family: Family) -> type[PretrainedConfig]:
    """The config class of the family's converted models, e.g. CaldWav2Vec2Config.

    Its ``layer_map`` (as JSON values) says which layer has which mixer.
    """
    return make_config_class(family, __name__, ConvertedConfig)


@cache
def converted_class(family: Family, base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of ``base`` models that have been converted, e.g. CaldWav2Vec2ForCTC."""
    return make_model_class(family, base, config_class(family), __name__, ConvertedModel)


def adopt(model: PreTrainedModel, family: Family, layer_map: LayerMap) -> None:
    """Make a model whose layers were just replaced one of the converted class, in place: it saves as what it is.

    One that is of that class already, and had further layers replaced, gets the map of all of them.
    """
    if isinstance(model.config, config_class(family)):
        model.config.layer_map = layer_map.to_dict()
        declare_shared(model)
        return
    config = config_class(family)(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    for key, value in vars(model.config).items():
        if isinstance(value, PretrainedConfig):  # the parts of a config stay the ones that the modules hold
            setattr(config, key, value)
    config._attn_implementation = model.config._attn_implementation
    config.layer_map = layer_map.to_dict()
    config.architectures = None
    cls = converted_class(family, type(model))
    model.__class__ = cls
    # How the original checkpoint's names were changed: saving would change them back, to names that only the original
    # class reads (GPT-NeoX's head is called embed_out in its files).
    model.__dict__.pop("_weight_conversions", None)
    model._keep_in_fp32_modules_strict = set(cls._keep_in_fp32_modules_strict)
    declare_shared(model)
    plain = model.config
    for module in model.modules():
        if getattr(module, "config", None) is plain:
            module.config = config


def register() -> None:
    """Tell transformers' Auto classes about the converted models of every family."""
    for family in families().values():
        config = config_class(family)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for head, base in family.classes.items():
            cls = converted_class(family, base)
            globals()[cls.__name__] = cls  # so that the classes pickle
            family.auto_classes[head].register(config, cls, exist_ok=True)
        globals()[config.__name__] = config


def from_pretrained(
    source: str | Path,
    *,
    head: str = "ctc",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    target_lang: str | None = None,
    new_head: bool = True,
    **overrides,
) -> PreTrainedModel:
    """A model, converted or not, in evaluation mode and with padding invisible to it.

    Arguments
    ---------
    source : a folder, or a Hugging Face hub id.
    head : one that the family has: ``base``, ``classification``, ``ctc`` (speech), ``lm`` or ``masked_lm`` (text).
    dtype : of the weights; A_log, dt_bias and D of converted models stay in float32. torch.int8: the layers' linear
        maps alone, on a CPU, for a model that is to run (:func:`~cald_speech.conversion.int8.in_int8`).
    device : where the model goes, such as ``cuda`` or ``cuda:1``.
    target_lang : the language of a model with an adapter for each (MMS); default: the one in the checkpoint.
    new_head : False refuses a checkpoint without weights for the head, which would be random.
    overrides : values for the config.

    Returns
    -------
    A model of the converted class where the folder holds one, of transformers' own class where it does not.

    Raises
    ------
    UserError
        where the model cannot be had, is truncated, is of an architecture not known here, or has no such head or
        language; where the device is not there.

    Example
    -------
    >>> model = from_pretrained("results/digits/target-seed0/model")  # doctest: +SKIP
    >>> model.config.model_type  # doctest: +SKIP
    'cald_wav2vec2'
    """
    if dtype == INT8 and str(device) != "cpu":
        raise UserError(f"dtype int8: expected a CPU, which alone has these kernels, got {device}. Use bfloat16 there")
    check_device(device)
    source = str(source)
    config = load_config(source)
    family = family_of(config)
    base = family.class_with(head)
    model_class = converted_class(family, base) if isinstance(config, config_class(family)) else base
    stored = torch.float32 if dtype == INT8 else dtype
    model = family.load(source, model_class=model_class, dtype=stored, new_head=new_head, **overrides).eval()
    if target_lang is not None:
        speak(model, source, target_lang)
    return in_int8(model) if dtype == INT8 else model.to(device)


def check_device(device: str | torch.device) -> None:
    """Raise UserError unless ``device`` is a CPU, or a GPU that is there.

    Example
    -------
    >>> check_device("cpu")
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device: expected cpu, cuda or a GPU's number such as cuda:1, got {device!r}") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() or "no"
        raise UserError(f"device {device}: torch {torch.__version__} sees {count} CUDA device here. Use --device cpu")


def load_config(source: str) -> PretrainedConfig:
    """The config of a folder or hub id. Raises UserError where there is none to be had."""
    return read_config(source)


def save_processor(processor: PushToHubMixin, model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model's processor beside it. A converted model's tells its feature extractor to return masks.

    Without a mask nothing can tell padding from silence, and a transcript would change with the batch. transformers'
    own models whose first norm is over time were trained without one, and are left as they are.
    """
    family = family_of(model)
    extractor = getattr(processor, "feature_extractor", processor)
    if isinstance(extractor, SequenceFeatureExtractor) and isinstance(model.config, config_class(family)):
        processor = copy.deepcopy(processor)
        getattr(processor, "feature_extractor", processor).return_attention_mask = True
    processor.save_pretrained(folder)
