"""A corpus, models and experiments of a few kilobytes, for everything that trains."""

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from transformers import PretrainedConfig

from cald_speech.data.audio import SAMPLE_RATE, write_audio
from cald_speech.data.text import make_processor
from cald_speech.families import families
from tests.helpers import tiny_config

ROOT = Path(__file__).resolve().parents[2]
# Seconds of the utterances of each split: all different, from 30 to 100 frames.
DURATIONS_S = {
    "train-clean-100": [round(0.6 + 0.09 * i, 2) for i in range(16)],
    "dev-clean": [0.7, 1.3, 0.9, 1.1],
    "test-clean": [0.8, 1.2, 0.65, 1.0],
}
SPLITS = {"train": ["train-clean-100"], "valid": ["dev-clean"]}
LETTERS = "ABCDE"


def write_corpus(folder: Path) -> Path:
    """24 utterances of noisy tones in LibriSpeech's layout; two to five letters each, one tone a letter."""
    generator = torch.Generator().manual_seed(0)
    for speaker, (split, durations_s) in enumerate(DURATIONS_S.items(), start=1):
        chapter = folder / split / str(speaker) / "7"
        lines = []
        for number, duration_s in enumerate(durations_s):
            utterance = f"{speaker}-7-{number:04d}"
            letters = torch.randint(len(LETTERS), (2 + number % 4,), generator=generator).tolist()
            write_audio(chapter / f"{utterance}.flac", _tones(letters, round(duration_s * SAMPLE_RATE), generator))
            text = "".join(LETTERS[i] for i in letters)
            lines.append(f"{utterance} {text[:2]} {text[2:]}".strip())
        (chapter / f"{speaker}-7.trans.txt").write_text("\n".join(lines) + "\n")
    return folder


def _tones(letters: list[int], num_samples: int, generator: torch.Generator) -> torch.Tensor:
    place = torch.arange(num_samples)
    letter = torch.tensor(letters)[place * len(letters) // num_samples]
    tone = 0.3 * torch.sin(2 * torch.pi * 300 * (letter + 1) * place / SAMPLE_RATE)
    return tone + 0.01 * torch.randn(num_samples, generator=generator)


def miniature_config(family: str = "wav2vec2", norm: str = "layer", layers: int = 2, **options) -> PretrainedConfig:
    """A model of some 30,000 parameters, 320 samples a frame, without dropout; it may have SpecAugment."""
    front_end = {"conv_dim": (8,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (8, 8, 5)}
    return tiny_config(families()[family], norm, layers, **{"apply_spec_augment": True} | front_end | options)


def write_model(
    folder: Path, family: str = "wav2vec2", *, head: str = "ctc", letters: str = LETTERS, **options
) -> Path:
    """A model with random weights in a folder; with its processor if it has a CTC head."""
    torch.manual_seed(1)
    if head == "ctc":
        options["vocab_size"] = len(make_processor(folder, [letters]).tokenizer)
    config = miniature_config(family, **options)
    families()[family].classes[head](config).save_pretrained(folder)
    return folder


CONVERTED = "!new:cald_speech.conversion.LayerMap"
BIDIRECTIONAL = "!name:cald_speech.mixers.Bidirectional"


def write_experiment(path: Path, *, convert: bool = True, converted_at: Sequence[int] = (), **keys) -> Path:
    """An experiment on the miniature corpus; ``keys`` are plain values, ``convert`` adds a layer map, ``converted_at``
    a schedule for it."""
    text = yaml.safe_dump(keys, sort_keys=False)
    if convert:
        options = "{share_projections: True, chunk_size: 16}"
        text += f"layer_map: {CONVERTED}\n    default: {BIDIRECTIONAL} {options}\n"
    if converted_at:
        text += f"conversion_schedule: !new:cald_speech.conversion.ConversionSchedule {{steps: {[*converted_at]}}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
