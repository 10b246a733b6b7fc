"""``python -m cald_speech.longform`` is a command by now."""

from cald_speech.errors import moved

if __name__ == "__main__":
    moved("cald-speech transcribe")
