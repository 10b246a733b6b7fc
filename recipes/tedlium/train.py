"""TED-LIUM 3: fine-tune a teacher, then convert and distil it, as in the paper (arXiv 2410.06846).

    python recipes/tedlium/train.py hparams/tedlium/teacher.yaml --data_folder data/TEDLIUM_release-3
    python recipes/tedlium/train.py hparams/tedlium/student.yaml --data_folder data/TEDLIUM_release-3 --guidance hybrid

recipes/tedlium/evaluate.py scores.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
