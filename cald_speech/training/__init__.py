"""Training: one experiment's settings, models, objective and Brain (floor F7).

Read ``run.py`` first: what :func:`cald_speech.training.run.train` does is on its first page. Then ``brain.py``, where
one optimiser step is ``CaldBrain.fit_batch``, and ``objective.py``, where CALD's equation is. Nothing is imported here.
"""
