"""The examples in the docstrings run, in every module."""

import doctest
from importlib import import_module
from pkgutil import walk_packages

import pytest

import cald_speech

MODULES = ["cald_speech", *sorted(m.name for m in walk_packages(cald_speech.__path__, "cald_speech."))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
