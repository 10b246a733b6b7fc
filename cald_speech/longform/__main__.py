"""``python -m cald_speech.longform FILE... --model FOLDER``: the same as ``cald-speech transcribe``."""

import sys

from cald_speech.errors import UserError
from cald_speech.longform.command import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
