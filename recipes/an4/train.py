"""AN4: fine-tune a teacher (or train one from scratch), then convert and distil it.

    python recipes/an4/train.py hparams/an4/teacher.yaml
    python recipes/an4/train.py hparams/an4/student.yaml --guidance target

recipes/an4/compare.py does so for every mode, mixer, number of steps and share of the labels.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
