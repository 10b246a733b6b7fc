"""Get the Free Spoken Digit Dataset from its public repository:

python recipes/digits/download.py
"""

import io
import logging
import re
import urllib.request
import zipfile
from pathlib import Path

import click

from cald_speech.commands.options import command
from cald_speech.errors import UserError
from cald_speech.files import whole_file

REPOSITORY = "https://github.com/Jakobovski/free-spoken-digit-dataset"
_ARCHIVE = f"{REPOSITORY}/archive/refs/heads/master.zip"
_CLIP = re.compile(r".*/(recordings/\d_[a-z]+_\d+\.wav)")

logger = logging.getLogger(__name__)


def download_recordings(data_folder: Path) -> None:
    """Fetch the archive (some 20 MB) and unpack its recordings into data_folder/recordings.

    Raises: UserError, where the archive cannot be fetched or is not what it should be.
    """
    logger.info("Fetching %s", _ARCHIVE)
    try:
        with urllib.request.urlopen(_ARCHIVE, timeout=60) as response:
            archive = zipfile.ZipFile(io.BytesIO(response.read()))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"expected the Free Spoken Digit Dataset at {_ARCHIVE}, but it could not be fetched ({error}). Check the "
            f"network, or clone {REPOSITORY} elsewhere and pass its folder as --data_folder."
        ) from error
    clips = [(member, match[1]) for member in archive.namelist() if (match := _CLIP.fullmatch(member))]
    for member, place in clips:
        with whole_file(data_folder / place) as unfinished:
            unfinished.write_bytes(archive.read(member))
    logger.info("Unpacked %d clips into %s", len(clips), data_folder / "recordings")


@command()
@click.argument("data_folder", type=Path, default="data/fsdd")
def main(data_folder: Path) -> None:
    """Fetch the recordings into DATA_FOLDER (default: data/fsdd), where the experiments look for them."""
    download_recordings(data_folder)
    click.echo(f"the recordings are in {data_folder / 'recordings'}")


if __name__ == "__main__":
    main()
