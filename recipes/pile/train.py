"""Language models: convert Pythia to Mamba or Mamba-2 on the Pile, or any model on any text, guided by itself.

    python recipes/pile/train.py hparams/pile/student.yaml --data_folder data/pile

hparams/stdlib*.yaml are the same at a size that two CPU cores train, on Python's own sources.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
