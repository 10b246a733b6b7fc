"""all-MiniLM-L6-v2: convert all six layers and distil them on sentences without labels.

    python recipes/minilm/train.py hparams/minilm/student.yaml

recipes/minilm/compare.py trains one student for each mixer and compares them with their teacher.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
