"""Kernels in C for CPUs, compiled on first use by the machine's own compiler: the ``native`` backend.

One shared library for all ops, called through ctypes: no headers of Python's or torch's, so it compiles in seconds, and
nothing has to match a version of either. Its threads are torch's own OpenMP threads. It is compiled for the processor
it runs on and kept (``CALD_SPEECH_CACHE``, else ``~/.cache/cald_speech``) under a name that says what made it. What is
kept is loaded from a folder that nobody else may write to, and only where it is whole (``kept.py``).
``CALD_SPEECH_NATIVE=0`` does without: ``auto`` then takes the ``torch`` backend, as it does where no compiler is.
"""

import ctypes
import os
from functools import cache

from cald_speech.ops.native.compiler import Built, build
from cald_speech.ops.native.kept import NotBuilt


def why_not_built() -> str | None:
    """Why there are no compiled kernels here, or None; compiles them if need be."""
    try:
        library()
    except NotBuilt as error:
        return str(error)
    return None


def library() -> ctypes.CDLL:
    """The compiled kernels. Raises :class:`NotBuilt` where they cannot be had."""
    return built().library


def built() -> Built:
    """The same with where they are kept, and whether they were found damaged."""
    if os.environ.get("CALD_SPEECH_NATIVE", "1") == "0":
        raise NotBuilt("CALD_SPEECH_NATIVE=0 forbids it.")
    kernels = _built_once()
    if isinstance(kernels, NotBuilt):
        raise kernels
    return kernels


@cache
def _built_once() -> Built | NotBuilt:
    """A failure is remembered as well: a process that has no compiler is not to look for one at every call."""
    try:
        return build()
    except NotBuilt as error:
        return error
