"""``python -m cald_speech.evaluation.word_times`` is a command by now; the code is the digits recipe's."""

from cald_speech.errors import moved

if __name__ == "__main__":
    moved("cald-speech word-times")
