"""What the command lines that look at a model layer by layer share: options, files, and errors in one paragraph."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cald_speech.errors import UserError
from cald_speech.files import whole_file

Found = dict[str, Any]


def add_common_options(parser: argparse.ArgumentParser, *, output: str) -> None:
    """--utterances, --max_batch_s, --device, --output and --quiet."""
    add = parser.add_argument
    add("--utterances", type=int, default=200, help="how many are read, evenly spread over the manifest (200)")
    add("--max_batch_s", type=float, default=60.0, help="seconds of audio in a batch, padding counted (60)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--output", type=Path, default=Path(output), help=f"folder for the JSON file and the figure ({output})")
    add("--quiet", action="store_true", help="no progress bar")


def made_and_written(
    make: Callable[[argparse.Namespace], Found],
    draw: Callable[[Mapping[str, Any], Path], Path],
    name: str,
    args: argparse.Namespace,
) -> Found:
    """What ``make`` finds, after <name>.json and <name>.png were written into ``args.output``, each whole or absent.

    What a user can mend is printed as one paragraph, and the process exits with status 2.
    """
    try:
        try:
            args.output.mkdir(parents=True, exist_ok=True)  # it may take an hour until there is something to write
        except OSError as error:
            raise _unwritable(args.output, error) from error
        found = make(args)
        try:
            with whole_file(args.output / f"{name}.json") as unfinished:
                unfinished.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            draw(found, args.output / f"{name}.png")
        except OSError as error:
            raise _unwritable(args.output, error) from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return found


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"--output {folder}: expected a folder to write to, but it cannot be written ({error.strerror}). Give another"
    )
