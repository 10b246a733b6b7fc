"""Tiny models and recordings for what looks at models layer by layer."""

from pathlib import Path

import torch

from cald_speech.conversion import from_pretrained
from cald_speech.data.audio import SAMPLE_RATE, read_audio, write_audio
from cald_speech.data.manifests import write_manifest
from cald_speech.families.hub import load_processor
from cald_speech.tasks.reading import whole
from tests.training.miniature import write_model

DURATIONS_S = (0.9, 0.31, 0.5, 0.3, 0.77, 0.42)


def write_teacher(folder: Path, **options) -> Path:
    """A tiny CTC model with random weights that writes many letters."""
    plain = write_model(folder.with_name(f"{folder.name}-plain"), **{"layers": 3} | options)
    return rewrite(plain, folder, lambda model: model.lm_head.weight.mul_(50))


@torch.no_grad()
def rewrite(folder: Path, into: Path, change, *, head: str = "ctc") -> Path:
    """The model of ``folder`` after ``change(model)``, in the folder ``into``; with the processor, if it writes."""
    torch.manual_seed(0)
    model = from_pretrained(folder, head=head)
    change(model)
    model.save_pretrained(into)
    if head == "ctc":
        load_processor(folder).save_pretrained(into)
    return into


def add_noise(scale: float):
    """A change that moves every layer's weights."""

    def change(model):
        for parameter in model.base_model.encoder.layers.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))

    return change


def write_recordings(folder: Path, teacher: Path) -> Path:
    """A manifest of noise; each text is what ``teacher`` reads, so that its own WER is 0."""
    model, processor = from_pretrained(teacher), load_processor(teacher)
    read, entries, generator = whole(model, processor), {}, torch.Generator().manual_seed(1)
    for number, duration_s in enumerate(DURATIONS_S):
        path = folder / f"{number}.wav"
        write_audio(path, 0.1 * torch.randn(int(duration_s * SAMPLE_RATE), generator=generator))
        entries[f"u{number}"] = {"audio": path, "duration_s": duration_s, "text": ""}
    for entry in entries.values():
        entry["text"] = read(read_audio(entry["audio"]))
    write_manifest(folder / "manifest.json", entries)
    return folder / "manifest.json"
