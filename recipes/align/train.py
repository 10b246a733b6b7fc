"""Convert an encoder once, on audio without transcripts, to fine-tune it for many tasks later.

    python recipes/align/train.py hparams/align/encoder.yaml --data_folder data/LibriSpeech/train-clean-100

Any folder of audio will do. What comes out is a converted encoder, which other recipes take as their --student.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
