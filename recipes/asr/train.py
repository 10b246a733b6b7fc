"""Data of your own: fine-tune a teacher, convert it, distil it.

    python recipes/asr/train.py hparams/asr/student.yaml --train train.csv --valid valid.csv --teacher FOLDER

docs/howto/own_data.md has an example of each format.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
