"""What is measured of models (floor F6): a library, which prints nothing; `cald-speech` has a command for each of it.

``forward`` is the pass over a data set that all share, ``report`` what an evaluation leaves behind. ``recognition``,
``labels`` and ``language`` score words, classes and text. ``by_length`` and ``lookahead`` read long and live audio.
``drift``, ``layer_importance`` and ``effective_memory`` look at models layer by layer, and ``figures`` draws.
"""
