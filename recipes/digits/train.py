"""Connected digits on real speech: train a teacher, then convert and distil it.

    python recipes/digits/train.py hparams/digits/teacher_start.yaml
    python recipes/digits/train.py hparams/digits/teacher.yaml
    python recipes/digits/train.py hparams/digits/student.yaml

See docs/results/digits.md for what came out.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
