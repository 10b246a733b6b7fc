"""A small general teacher, trained on seven hours of read speech: see README.md, beside this file."""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
