"""TED-LIUM 3, the legacy split, to manifests: every utterance is a segment of its talk, which is read where it lies.

<data_folder>[/TEDLIUM_release-3]/legacy/<split>/sph/<talk>.sph holds the talks (NIST SPHERE, 16 kHz), and
<data_folder>[/TEDLIUM_release-3]/legacy/<split>/stm/<talk>.stm their segments and transcripts.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cald_speech.data.audio import MIN_SAMPLES, SAMPLE_RATE
from cald_speech.data.manifests import durations_s, prepare_once, refuse, refuse_or_drop
from cald_speech.data.text import normalise
from cald_speech.errors import UserError
from cald_speech.recipes.tedlium.stm import Segment, read_stm

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "valid": "dev"}
OFFICIAL_COUNTS = {
    "train": {"talks": 2_351, "segments": 268_263},
    "dev": {"talks": 8, "segments": 507},
    "test": {"talks": 11, "segments": 1_155},
}
# STM files have two or three decimals: a segment to the end of its talk may be written as ending a little later.
STM_ROUNDING_S = 0.01
_WAY_OUT = "TED-LIUM 3 is at https://www.openslr.org/51: unpack TEDLIUM_release-3.tgz and pass --data_folder."
_AGAIN = "Unpack TEDLIUM_release-3.tgz (https://www.openslr.org/51) again"


def prepare(
    data_folder: Path, output_folder: Path, *, splits: Mapping[str, str] = SPLITS, drop_bad_audio: bool = False
) -> dict[str, Path]:
    """Write output_folder/manifests/<name>.json for each name in `splits` and return {name: that path}.

    `splits` says which folder makes up a manifest: {"train": "train", "valid": "dev"}. A manifest is written again only
    where its files changed or it was edited. Transcripts are kept as they stand, for the normaliser "tedlium"; segments
    that are not to be scored, and those in which it leaves no word, are left out. `drop_bad_audio` leaves out what is
    missing, damaged, of another rate or beyond the end of its talk, instead of refusing it.

    Raises: UserError, naming what is missing, cannot be used or is malformed.
    """
    root = _corpus_root(Path(data_folder))
    manifests = {}
    for name, split in splits.items():
        manifests[name] = Path(output_folder) / "manifests" / f"{name}.json"
        stm, sph = (sorted((root / split / kind).glob(f"*.{kind}")) for kind in ("stm", "sph"))
        for kind, found in (("stm", stm), ("sph", sph)):
            if not found:
                raise UserError(f"expected {split}/{kind}/*.{kind} in {root}, but there is none. {_WAY_OUT}")
        make = partial(_entries, split, stm, sph, drop_bad_audio)
        prepare_once(manifests[name], [*stm, *sph], make, drop_bad_audio=drop_bad_audio)
    return manifests


def _corpus_root(data_folder: Path) -> Path:
    for place in (data_folder / "TEDLIUM_release-3", data_folder):
        if (place / "legacy").is_dir():
            return (place / "legacy").absolute()
    raise UserError(f"expected the folder legacy of TED-LIUM 3 in {data_folder}, but it is not there. {_WAY_OUT}")


def _entries(split: str, stm: Sequence[Path], sph: Sequence[Path], drop_bad_audio: bool) -> dict[str, dict]:
    """Match segments with talks; all that is wrong with the audio is told at once."""
    segments = [segment for path in stm for segment in read_stm(path)]
    talks = {segment.recording: sph[0].with_name(f"{segment.recording}.sph") for segment in segments}
    told = {path.stem for path in stm} | talks.keys()
    silent = [str(path) for path in sph if path.stem not in told]
    refuse(split, "an STM file for each talk", "talks without one", silent, f"{_AGAIN}.")
    scored = [segment for segment in segments if segment.is_scored]
    _warn_of_counts(split, {"talks": len(talks), "segments": len(scored)})
    spoken = [segment for segment in scored if normalise(segment.text, "tedlium")]
    durations, faults = durations_s(sorted(talks.values()), rate=SAMPLE_RATE)
    entries = {}
    for segment in spoken:
        path = talks[segment.recording]
        fault = _fault(segment, path, durations[path]) if path in durations else None
        if fault:
            faults.append(fault)
        elif path in durations:
            utterance = f"{segment.recording}-{1000 * segment.start_s:08.0f}-{1000 * segment.end_s:08.0f}"
            if utterance in entries:
                raise UserError(f"{segment.place}: the talk has this segment twice. Leave out one of the lines.")
            duration_s = min(segment.end_s, durations[path]) - segment.start_s
            seconds = {"start_s": segment.start_s, "duration_s": duration_s}
            entries[utterance] = {"audio": path, **seconds, "text": segment.text, "speaker": segment.speaker}
    expected, what = "whole talks at 16 kHz with all their segments", "talks and segments that cannot be used"
    refuse_or_drop(split, expected, what, faults, _AGAIN, drop_bad_audio=drop_bad_audio)
    logger.info("%s: %d segments; %d more hold no word", split, len(entries), len(scored) - len(spoken))
    return entries


def _fault(segment: Segment, talk: Path, duration_s: float) -> str | None:
    if segment.end_s > duration_s + STM_ROUNDING_S:
        return f"{segment.place}: the segment ends at {segment.end_s:g} s, but {talk} at {duration_s:g} s"
    if (min(segment.end_s, duration_s) - segment.start_s) * SAMPLE_RATE < MIN_SAMPLES:
        return f"{segment.place}: the segment is shorter than one frame of 25 ms"
    return None


def _warn_of_counts(split: str, counts: Mapping[str, int]) -> None:
    for what, count in counts.items():
        official = OFFICIAL_COUNTS.get(split, counts)[what]
        if count != official:
            logger.warning(
                "%s holds %d %s, but the official one has %d: error rates on it do not compare with published ones.",
                *(split, count, what, official),
            )
