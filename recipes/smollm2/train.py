"""SmolLM2-135M: convert some of its layers, guided by itself, on Python's own sources.

    python recipes/smollm2/train.py hparams/smollm2/student.yaml

recipes/smollm2/compare.py chooses the layers, and trains and compares several.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
