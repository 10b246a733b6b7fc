"""Converted models as Hugging Face classes and folders.

A converted model has a ``model_type`` and a class of its own, whose ``__init__`` builds the base model and converts it.
In a folder that said ``wav2vec2``, transformers alone would load random attention and only mention it; with
``cald_wav2vec2`` it fails loudly, and after ``import cald_speech`` the Auto classes and ``pipeline`` work.

A converted class is called ``Cald`` and its base class's name: ``CaldWav2Vec2ForCTC`` is ``Wav2Vec2ForCTC`` with
mixers. No file has a ``class`` line for it. :func:`converted_class` makes it, its config's class comes from
:func:`config_class`, and :func:`register` makes those of every family; each file in ``families/`` names its own.
"""

import copy
from functools import cache, wraps
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor
from transformers.modeling_utils import _CAN_RECORD_REGISTRY
from transformers.utils import PushToHubMixin

from cald_speech.conversion.layer_map import LayerMap
from cald_speech.conversion.replace import replace_layers
from cald_speech.errors import UserError
from cald_speech.families import Family, families, family_of
from cald_speech.families.hub import read_config
from cald_speech.families.languages import speak
from cald_speech.mixers import SCAN_PARAMETERS


@cache
def config_class(family: Family) -> type[PretrainedConfig]:
    """The config class of the family's converted models, e.g. CaldWav2Vec2Config.

    Its ``layer_map`` (as JSON values) says which layer has which mixer.
    """
    body = {"model_type": f"cald_{family.model_type}", "__annotations__": {"layer_map": dict | None}, "layer_map": None}
    return type(f"Cald{family.config_class.__name__}", (family.config_class,), body | {"__module__": __name__})


@cache
def converted_class(family: Family, base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of ``base`` models that have been converted, e.g. CaldWav2Vec2ForCTC."""

    def __init__(self, config: PretrainedConfig, *args, **kwargs):
        base.__init__(self, config, *args, **kwargs)
        if config.layer_map is None:
            raise UserError(
                "a converted model's config.json needs a layer_map, and this one has none: expected a folder written "
                "by cald_speech. Load an unconverted model with its own model_type"
            )
        try:
            layer_map = LayerMap.from_dict(config.layer_map)
        except (KeyError, ValueError) as error:
            raise UserError(f"the layer_map in the model's config.json cannot be read: {error}") from error
        # transformers' generic heads build their base model by its config, so that it is a converted one by now.
        if not any(family.mixer(layer) for layer in family.layers(self)):
            replace_layers(self, family, layer_map.factories(len(family.layers(self))), initialise="random")
        declare_shared(self)

    @wraps(base.forward)
    def forward(self, *args, **kwargs):
        return family.settled(self, base.forward(self, *args, **kwargs))

    def tie_weights(self, **kwargs):
        base.tie_weights(self, **kwargs)  # in the CTC classes it is about adapters alone
        PreTrainedModel.tie_weights(self, **kwargs)

    body = {
        "__init__": __init__,
        "forward": forward,
        "tie_weights": tie_weights,
        "__doc__": f"A {base.__name__} with linear-time mixers in its layers; built from its config's ``layer_map``.",
        "__module__": __name__,
        "config_class": config_class(family),
        "_keep_in_fp32_modules_strict": {*(base._keep_in_fp32_modules_strict or ()), *SCAN_PARAMETERS},
        "_is_stateful": family.causal,  # a scan's state cannot be taken back, as assisted generation would
    }
    cls = type(f"Cald{base.__name__}", (base,), body)
    # transformers looks up here, by class, which outputs (hidden states) a model can be asked for. Its __init__ enters
    # them, which does not run where a model is converted in place.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)
    return cls


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


def declare_shared(model: PreTrainedModel) -> None:
    """Tell transformers which parameters mixers share: a folder then holds them once, and loading shares them again."""
    names: dict[int, str] = {}
    shared = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name and ".mixer." in name:
            shared[name] = first
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **shared}
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **shared}


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
    **overrides,
) -> PreTrainedModel:
    """A model, converted or not, in evaluation mode and with padding invisible to it.

    Arguments
    ---------
    source : a folder, or a Hugging Face hub id.
    head : one that the family has: ``base``, ``classification``, ``ctc`` (speech), ``lm`` or ``masked_lm`` (text).
    dtype : of the weights; A_log, dt_bias and D of converted models stay in float32.
    device : where the model goes, such as ``cuda`` or ``cuda:1``.
    target_lang : the language of a model with an adapter for each (MMS); default: the one in the checkpoint.
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
    check_device(device)
    source = str(source)
    config = load_config(source)
    family = family_of(config)
    base = family.class_with(head)
    model_class = converted_class(family, base) if isinstance(config, config_class(family)) else base
    model = family.load(source, model_class=model_class, dtype=dtype, **overrides).eval()
    if target_lang is not None:
        speak(model, source, target_lang)
    return model.to(device)


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
