"""The examples in the docstrings run, in every module."""

import doctest
from importlib import import_module
from pkgutil import walk_packages

import pytest

import cald_speech
from cald_speech.shipped import recipes_folder

MODULES = ["cald_speech", *sorted(m.name for m in walk_packages(cald_speech.__path__, "cald_speech."))]
# Their train.py are scripts, and import what lies beside them.
RECIPES = sorted(path for path in recipes_folder().glob("*/*.py") if path.stem != "train")
MODULES += [f"cald_speech.recipes.{path.parent.name}.{path.stem}" for path in RECIPES]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
