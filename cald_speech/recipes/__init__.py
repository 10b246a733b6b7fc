"""The recipes as modules: ``cald_speech.recipes.librispeech.prepare`` is recipes/librispeech/prepare.py.

In a checkout they lie in its top-level folder ``recipes``; where the package was installed, they lie in here. Any
number of them can be used in one process, and one can use another.
"""

from cald_speech.shipped import recipes_folder

__path__ = [str(recipes_folder())]
