"""Damaged audio in the formats that libsndfile writes: cut, overwritten, joined, with lengths that are not so."""

import random
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch

from cald_speech.audio_files import AudioFile
from cald_speech.data.audio import AudioError, read_audio
from cald_speech.errors import UserError
from cald_speech.longform import AudioSource

LENGTHS = (0, 1, 2, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 44_101, 10**8)
MOST_MINUTES = 10  # of what a small file may hold
# What ends anywhere between two samples without a sign: these formats have no length, VOC an end that is no sound.
NO_LENGTH = ("IRCAM", "PVF", "PAF", "SD2", "XI", "VOC")


@cache
def sound() -> dict[str, bytes]:
    """A sound in every format and coding, by both."""
    made, generator = {}, np.random.default_rng(0)
    place = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp")
    for form in soundfile.available_formats():
        for coding in soundfile.available_subtypes(form) if form != "RAW" else ():
            path = place / f"cald-sound-{random.getrandbits(64):x}.{form.lower()}"
            rate, channels = (8_000, 1) if form == "WVE" else (16_000, 1 if form in ("XI", "SDS", "HTK") else 2)
            try:
                soundfile.write(path, 0.1 * generator.standard_normal((6_000, channels)), rate, coding, format=form)
                made[f"{form} {coding}"] = path.read_bytes()
            except (soundfile.LibsndfileError, ValueError):
                continue  # a coding with one channel or rate alone
            finally:
                for left in (path, path.with_name(f"._{path.name}")):
                    left.unlink(missing_ok=True)
    return made


def mutations(seed: int | str) -> tuple[str, bytes, bool]:
    """A damaged file: its format and coding, its bytes, and whether it is cut off and nothing else."""
    rng = random.Random(seed)
    name = rng.choice(sorted(sound()))
    content = bytearray(sound()[name])
    if rng.random() < 0.25:
        return name, bytes(content[: rng.randrange(len(content) // 4, len(content))]), True
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(content) if rng.random() < 0.5 else min(len(content), 120))
        kind = rng.randrange(7)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + 4] = rng.choice(LENGTHS).to_bytes(4, rng.choice(["big", "little"]))
        elif kind == 2:
            content[at : at + rng.randrange(1, 300)] = rng.randbytes(rng.randrange(300))
        elif kind == 3:
            content[at : at + 200] = bytes(200)
        elif kind == 4:
            content += rng.choice(
                [bytes(content), rng.randbytes(100), bytes(5_000), sound()[rng.choice(sorted(sound()))]]
            )
        elif kind == 5:
            content[0:0] = rng.choice([b"ID3\4\0\0\0\0\0\x0a" + bytes(10), rng.randbytes(8)])
        else:
            del content[max(64, at) :]
        content = content or bytearray(b"\0")
    return name, bytes(content), False


def damaged_audio(rng: random.Random, folder: Path) -> None:
    """Read for training and by long form, which agree: what one refuses has a fault for the other, as cut files do."""
    name, content, is_cut = mutations(rng.random())
    path = folder / f"a.{rng.choice([name.split()[0].lower(), 'wav', 'raw', 'x'])}"
    path.write_bytes(content)
    source = AudioSource.open(path)
    length, longest = 0, MOST_MINUTES * 60 * 16_000
    for block in source.blocks(16_000):
        assert block.dtype == torch.float32 and block.isfinite().all()
        length += len(block)
        assert length <= longest, f"{name}: {len(content)} bytes give more than {MOST_MINUTES} minutes"
    assert length == source.num_samples
    try:
        whole = read_audio(path, min_samples=0)
    except AudioError as error:
        assert source.fault is not None, f"{name}: long form reads what is refused: {error}"
        raise
    assert source.fault is None, f"{name}: {source.fault}, but it is read for training"
    assert len(whole) == length
    silent = is_cut and not name.startswith(NO_LENGTH)
    assert not silent or _all_there(name, path), f"{name} is cut off to {len(content)} bytes, and nothing is said"


def _all_there(name: str, path: Path) -> bool:
    """Whether the cut took no sound: padding at the end."""
    other = path.with_name("whole")
    other.write_bytes(sound()[name])
    file, whole = AudioFile(path), AudioFile(other)
    return np.array_equal(file.read(10**6), whole.read(10**6))


def check_sound(folder: Path) -> None:
    """What the files are damaged from has no fault."""
    for name, content in sound().items():
        path = folder / "sound"
        path.write_bytes(content)
        try:
            file = AudioFile(path)
        except UserError:
            assert name.startswith("SD2"), name  # its header is a second file
            continue
        assert len(file.read(10**6)) >= 2_900 and file.fault is None, (name, file.fault)


GENERATORS = {"audio": damaged_audio}
