"""What a converted model is while it runs: its config's class, and its own.

A folder's own file is made of this one and of what it uses (``modeling_file.py``), so that nothing stands here that
saving, converting or the commands alone need.
"""

from functools import wraps

from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import _CAN_RECORD_REGISTRY

from cald_speech.conversion.layer_map import LayerMap
from cald_speech.conversion.replace import replace_layers
from cald_speech.errors import UserError
from cald_speech.families.base import Family
from cald_speech.mixers.scan import SCAN_PARAMETERS


def make_config_class(family: Family, module: str, *mixins: type) -> type[PretrainedConfig]:
    """The config class of the family's converted models, e.g. CaldWav2Vec2Config.

    Arguments
    ---------
    family : whose models they are.
    module : the name of the one that the class is to be found in.
    mixins : what it has before its family's config.
    """
    body = {"model_type": f"cald_{family.model_type}", "__annotations__": {"layer_map": dict | None}, "layer_map": None}
    return type(config_name(family), (*mixins, family.config_class), body | {"__module__": module})


def config_name(family: Family) -> str:
    """What that class is called."""
    return f"Cald{family.config_class.__name__}"


def make_model_class(
    family: Family, base: type[PreTrainedModel], config_class: type[PretrainedConfig], module: str, *mixins: type
) -> type[PreTrainedModel]:
    """The class of ``base`` models that have been converted, e.g. CaldWav2Vec2ForCTC; the rest as for its config's."""

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
            replace_layers(self, family, layer_map.factories(len(family.layers(self))))
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
        "__module__": module,
        "config_class": config_class,
        "_keep_in_fp32_modules_strict": {*(base._keep_in_fp32_modules_strict or ()), *SCAN_PARAMETERS},
        "_is_stateful": family.causal,  # a scan's state cannot be taken back, as assisted generation would
    }
    cls = type(model_name(base), (*mixins, base), body)
    # transformers looks up here, by class, which outputs (hidden states) a model can be asked for. Its __init__ enters
    # them, which does not run where a model is converted in place.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)
    return cls


def model_name(base: type[PreTrainedModel]) -> str:
    """What that class is called."""
    return f"Cald{base.__name__}"


def declare_shared(model: PreTrainedModel) -> None:
    """Tell transformers which parameters mixers share: a folder then holds them once, and loading shares them again."""
    names: dict[int, str] = {}
    shared = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name and ".mixer." in name:
            shared[name] = first
    if not shared:  # None stays None: PEFT asks models that tie weights for embeddings, which speech encoders lack
        return
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **shared}
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **shared}
