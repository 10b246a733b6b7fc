"""Spoken intent on real speech: which drink is ordered. Fine-tune a teacher, then convert and distil it.

    python recipes/coffee_orders/train.py hparams/coffee_orders/teacher.yaml
    python recipes/coffee_orders/train.py hparams/coffee_orders/student.yaml

recipes/coffee_orders/crossvalidate.py does so for all five folds.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
