"""The embedded corpus of `make demo`: spoken commands, synthesised with espeak-ng in LibriSpeech's own folder layout.

    folder/LibriSpeech/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<utterance>.flac  and  ....trans.txt

The test and dev voices, and their whole word sequences, never occur in train. The same seed gives the same bytes.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from cald_speech.data.audio import SAMPLE_RATE, to_16_khz, write_audio
from cald_speech.errors import UserError
from cald_speech.files import settle
from cald_speech.recipes.demo.corpus_plan import DEFAULT_SPLITS, Split, Utterance, draw_corpus, split_generator
from cald_speech.recipes.demo.noise import babble, mix, pink, white

ESPEAK_RATE = 22_050
MARKER = ".synthesised"
_RECIPE_VERSION = 1  # raise it where other bytes would come out for the same settings


def synthesise_corpus(folder: str | Path, *, seed: int = 0, splits: Sequence[Split] = DEFAULT_SPLITS) -> Path:
    """Synthesise the corpus into `folder`/LibriSpeech and return that path; nothing is done where it is already there.

    It is built under another name and renamed when complete, so an interrupted run leaves nothing that looks finished.
    A corpus of other settings that this function wrote is replaced; anything else in the place is refused.

    Raises: UserError, where espeakng-loader is not installed, or another LibriSpeech folder is in the way.

    Example
    -------
    >>> import tempfile
    >>> from cald_speech.recipes.demo.voices import DEV_VARIANTS
    >>> tiny = Split("dev", DEV_VARIANTS, first_speaker=1, num_speakers=1, num_utterances=2)
    >>> corpus = synthesise_corpus(tempfile.mkdtemp(), splits=[tiny])
    >>> sorted(path.name for path in (corpus / "dev/1/1").iterdir())
    ['1-1-0000.flac', '1-1-0001.flac', '1-1.trans.txt']
    """
    folder = Path(folder)
    corpus, unfinished = folder / "LibriSpeech", folder / ".LibriSpeech.unfinished"
    settings = json.dumps({"version": _RECIPE_VERSION, "seed": seed, "splits": [asdict(split) for split in splits]})
    if corpus.exists():
        marker = corpus / MARKER
        if not marker.is_file():
            raise UserError(
                f"{corpus} holds something that was not synthesised here. Give another folder, or move it away."
            )
        if marker.read_text() == settings:
            return corpus
        shutil.rmtree(corpus)
    shutil.rmtree(unfinished, ignore_errors=True)
    utterances = draw_corpus(seed=seed, splits=splits)
    for split in splits:
        _write_split(unfinished / split.name, split, utterances[split.name], seed)
    (unfinished / MARKER).write_text(settings)
    settle()
    os.replace(unfinished, corpus)
    return corpus


def _write_split(folder: Path, split: Split, utterances: Sequence[Utterance], seed: int) -> None:
    generator = split_generator(seed, split, "noise")
    spoken = [_at_16_khz(samples) for samples in speak(utterances)]
    lines: dict[Path, list[str]] = {}
    for utterance, speech in zip(utterances, spoken, strict=True):
        chapter = folder / str(utterance.speaker) / "1"
        noisy = _with_noise(speech, spoken, split.snr_db, generator)
        write_audio(chapter / f"{utterance.name}.flac", torch.from_numpy(noisy))
        lines.setdefault(chapter, []).append(f"{utterance.name} {utterance.text}\n")
    for chapter, transcripts in lines.items():
        (chapter / f"{chapter.parent.name}-1.trans.txt").write_text("".join(transcripts))


def speak(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """Speak all `utterances` in a new process: (N,) int16 at 22,050 Hz for each, the same bytes whenever asked.

    Raises: UserError, where espeakng-loader is not installed; RuntimeError with espeak's own words, where it fails.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise UserError(
            "The demo corpus is spoken by espeak-ng, which comes with the package espeakng-loader, but that is not "
            "installed here. Install it with: pip install 'cald-speech[demo]'"
        )
    keys = ("voice", "rate_wpm", "pitch", "pitch_range")
    requests = [{"text": u.text.lower(), **{key: getattr(u, key) for key in keys}} for u in utterances]
    # -P: the script's own folder, with our text.py and audio.py, must not come before the standard library
    command = [sys.executable, "-P", str(Path(__file__).with_name("espeak.py"))]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    result = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"espeak-ng failed: {result.stderr.decode().strip()}")
    return _unpack(result.stdout)


def _unpack(data: bytes) -> list[np.ndarray]:
    spoken, start = [], 0
    while start < len(data):
        count = int.from_bytes(data[start : start + 4], "little")
        spoken.append(np.frombuffer(data, dtype="<i2", count=count, offset=start + 4))
        start += 4 + 2 * count
    return spoken


def _at_16_khz(samples: np.ndarray) -> np.ndarray:
    speech = torch.from_numpy(samples.astype(np.float32) / 2**15)
    return to_16_khz(speech, ESPEAK_RATE).numpy()


def _with_noise(
    speech: np.ndarray, crowd: Sequence[np.ndarray], snr_db: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """A quiet moment before and after, noise of one kind throughout, at a loudness of its own."""
    before, after = generator.integers(SAMPLE_RATE // 20, SAMPLE_RATE // 5, size=2)
    padded = np.pad(speech, (before, after))
    kind = generator.integers(3)
    if kind == 0:
        noise = white(len(padded), generator)
    elif kind == 1:
        noise = pink(len(padded), generator)
    else:
        noise = babble(len(padded), [crowd[i] for i in generator.integers(len(crowd), size=5)], generator)
    noisy = mix(padded, noise, generator.uniform(*snr_db))
    loudest = generator.uniform(0.2, 0.9)
    return noisy * np.float32(loudest / np.abs(noisy).max())
