"""VoxCeleb1, speaker identification, to manifests: the speaker is the label, and the official split says what is where.

<data_folder>/iden_split.txt has lines "1 id10001/1zcIwhmdeo4/00001.wav" (1: train, 2: valid, 3: test); the audio is in
<data_folder>[/wav, /dev/wav, /test/wav]/<speaker>/<video>/<clip>.wav.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cald_speech.data.encodings import read_text
from cald_speech.data.manifests import durations_s, prepare_once, refuse_or_drop
from cald_speech.errors import UserError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
OFFICIAL_COUNTS = {"train": 138_361, "valid": 6_904, "test": 8_251}
FOLDERS = ("wav", "dev/wav", "test/wav", "")
_LINE = re.compile(r"([123])\s+(id\d+/[^/\s]+/[^/\s]+\.wav)")
_WAY_OUT = (
    "VoxCeleb1 is at https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html: unpack its dev and test archives, put "
    "iden_split.txt (its list for identification) beside them and pass their folder --data_folder"
)


def prepare(
    data_folder: Path,
    output_folder: Path,
    *,
    splits: Sequence[str] = SPLITS,
    split_file: str = "iden_split.txt",
    drop_bad_audio: bool = False,
) -> dict[str, Path]:
    """Write output_folder/manifests/<name>.json for each name in `splits` and return {name: that path}.

    A manifest is written again only where its files changed or it was edited, so that an interrupted preparation goes
    on with the next set. `split_file` is a path, or a name in the data folder. Files of any rate will do;
    `drop_bad_audio` leaves out what is missing or damaged instead of refusing it.

    Raises: UserError, naming what is missing, cannot be used or is malformed.
    """
    root = Path(data_folder).absolute()
    lists = read_split(root / split_file)
    manifests = {}
    for name in splits:
        if name not in lists:
            raise UserError(f"splits: expected some of {', '.join(SPLITS)}, got {name!r}")
        manifests[name] = Path(output_folder) / "manifests" / f"{name}.json"
        clips = {clip: _find(root, clip) for clip in lists[name]}
        make = partial(_entries, name, clips, drop_bad_audio)
        prepare_once(manifests[name], [root / split_file, *clips.values()], make, drop_bad_audio=drop_bad_audio)
    return manifests


def read_split(path: Path) -> dict[str, list[str]]:
    """The clips of each set. Raises: UserError, where there is no file; with its line where one is malformed."""
    if not path.is_file():
        raise UserError(f"expected the official split in {path}, but there is no such file. {_WAY_OUT}.")
    lists: dict[str, list[str]] = {name: [] for name in SPLITS}
    seen = set()
    for number, line in enumerate(read_text(path, "the official split").split("\n"), start=1):
        match = _LINE.fullmatch(line.strip())
        if line.strip() and (match is None or match[2] in seen):
            got = f"got {line.strip()!r}" if match is None else f"each clip once, got {match[2]} again"
            raise UserError(
                f"{path}:{number}: expected a line such as '1 id10001/1zcIwhmdeo4/00001.wav', the set being 1, 2 or 3, "
                f"{got}. Download the file again, or mend the line."
            )
        if match:
            seen.add(match[2])
            lists[SPLITS[int(match[1]) - 1]].append(match[2])
    return lists


def _find(root: Path, clip: str) -> Path:
    """Where the clip is, or where it would be if it is nowhere."""
    places = [root / folder / clip for folder in FOLDERS]
    return next((place for place in places if place.is_file()), places[0])


def _entries(name: str, clips: Mapping[str, Path], drop_bad_audio: bool) -> dict[str, dict]:
    if len(clips) != OFFICIAL_COUNTS[name]:
        logger.warning(
            "%s holds %d clips, but the official one has %d: accuracies on it do not compare with published ones.",
            *(name, len(clips), OFFICIAL_COUNTS[name]),
        )
    durations, faults = durations_s(clips.values())
    expected = f"{len(clips)} clips that can be read"
    refuse_or_drop(name, expected, "that cannot", faults, _WAY_OUT, drop_bad_audio=drop_bad_audio)
    return {
        clip.removesuffix(".wav").replace("/", "-"): {
            "audio": path,
            "duration_s": durations[path],
            "text": clip.split("/")[0],
        }
        for clip, path in clips.items()
        if path in durations
    }
