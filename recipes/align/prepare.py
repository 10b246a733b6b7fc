"""Any folder of audio to manifests without transcripts: a training set, and a few files kept back to validate on."""

import logging
import random
from pathlib import Path

from tqdm import tqdm

from cald_speech.data.audio import MIN_SAMPLES, SAMPLE_RATE, AudioError, audio_info
from cald_speech.data.manifests import write_manifest
from cald_speech.data.readers.folders import audio_among, files_in
from cald_speech.errors import UserError

logger = logging.getLogger(__name__)


def prepare(
    data_folder: Path, output_folder: Path, *, num_valid: int = 100, longest_s: float = 40.0, seed: int = 0
) -> dict[str, Path]:
    """Write output_folder/manifests/{train,valid}.json over every audio file under `data_folder`.

    `num_valid` files, drawn by `seed`, are for validation (at most half of all). Files that are longer than `longest_s`
    seconds or shorter than a frame are left out, and counted in the log.

    Raises: UserError, where there is no folder, fewer than two usable files, or files that cannot be read.
    """
    data_folder, folder = Path(data_folder).absolute(), Path(output_folder) / "manifests"
    files = audio_among(files_in(data_folder))
    entries, faults, left_out = {}, [], 0
    for path in tqdm(files, desc="reading headers", unit="file", disable=len(files) < 1000):
        try:
            num_samples, rate = audio_info(path)
        except AudioError as error:
            faults.append(str(error))
            continue
        if MIN_SAMPLES / SAMPLE_RATE <= num_samples / rate <= longest_s:
            name = str(path.relative_to(data_folder).with_suffix(""))
            if name in entries:  # talk.wav beside talk.mp3
                name = str(path.relative_to(data_folder))
            entries[name] = {"audio": path, "duration_s": num_samples / rate, "text": ""}
        else:
            left_out += 1
    if faults:
        raise UserError(
            f"expected audio that can be read, but {len(faults)} of {len(files)} files cannot, the first: {faults[0]} "
            "Copy them again, or give a folder without them"
        )
    if len(entries) < 2:
        raise UserError(
            f"expected at least two files of audio of up to {longest_s:g} s under {data_folder}, got "
            f"{len(entries)} of {len(files)}. Give another --data_folder, or raise longest_s in `corpus`"
        )
    if left_out:
        logger.info("%d of %d files are shorter than a frame or longer than %g s", left_out, len(files), longest_s)
    valid = set(random.Random(seed).sample(sorted(entries), min(num_valid, len(entries) // 2)))
    for name, wanted in (("train", entries.keys() - valid), ("valid", valid)):
        write_manifest(folder / f"{name}.json", {key: entries[key] for key in wanted})
    return {name: folder / f"{name}.json" for name in ("train", "valid")}
