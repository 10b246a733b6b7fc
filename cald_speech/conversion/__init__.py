"""Conversion (floor F3): from a pretrained model and a layer map to a model that saves and loads as what it has become.

``layer_map`` says which layer gets which mixer, ``schedule`` at which step of a training, ``replace`` puts the mixers
in, ``convert`` does so for a pretrained model and reports on every parameter, ``classes`` makes the Hugging Face
classes of converted models (``converted`` what of them runs), ``modeling_file`` the file by which transformers alone
loads a folder, ``bundle`` any such file out of sources, ``export`` writes ONNX, ``model_card`` what is known of it.
Importing this package registers the classes with transformers' Auto classes.
"""

from cald_speech.conversion.classes import (
    check_device,
    config_class,
    converted_class,
    from_pretrained,
    load_config,
    register,
    save_processor,
)
from cald_speech.conversion.convert import ConversionReport, SlotFit, convert
from cald_speech.conversion.export import ExportedModel, check_onnx, export_onnx
from cald_speech.conversion.layer_map import LayerMap, type_name
from cald_speech.conversion.replace import STARTS, replace_layers
from cald_speech.conversion.schedule import ConversionSchedule, converted_before

__all__ = [
    "STARTS",
    "ConversionReport",
    "ConversionSchedule",
    "ExportedModel",
    "LayerMap",
    "SlotFit",
    "check_device",
    "check_onnx",
    "config_class",
    "convert",
    "converted_before",
    "converted_class",
    "export_onnx",
    "from_pretrained",
    "load_config",
    "register",
    "replace_layers",
    "save_processor",
    "type_name",
]

register()
