"""SLURP intents: fine-tune a teacher, then convert and distil it.

    python recipes/slurp/train.py hparams/slurp/teacher.yaml --data_folder data/slurp
    python recipes/slurp/train.py hparams/slurp/student.yaml --data_folder data/slurp --guidance hybrid

hparams/slurp/joint.yaml spells out intent and words with CTC; recipes/slurp/evaluate.py scores.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
