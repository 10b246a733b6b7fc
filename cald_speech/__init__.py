"""Convert pretrained speech encoders to linear-time models while fine-tuning them (CALD, arXiv 2410.06846).

Importing the package registers the converted model classes with transformers, and no more.
"""

from cald_speech.conversion import ConversionReport, LayerMap, convert, from_pretrained, register

__version__ = "0.1.0"
__all__ = ["ConversionReport", "LayerMap", "convert", "from_pretrained"]

register()
