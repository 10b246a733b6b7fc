"""LibriSpeech (or any corpus in its layout): fine-tune a teacher, convert it, distil it.

    python recipes/librispeech/train.py hparams/mamba.yaml --data_folder data/LibriSpeech

hparams/teacher.yaml fine-tunes a teacher from a self-supervised encoder; recipes/librispeech/evaluate.py scores.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
