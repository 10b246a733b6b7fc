"""Several utterances made into one: longer audio to train on, and recordings of any length to test with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Wav2Vec2Processor

from cald_speech.data.audio import SAMPLE_RATE, read_entry

# What stands between utterances: noise 40 dB below the utterances' level when training, 55 dB below full scale in
# recordings. Digital silence occurs in neither speech nor training.
PAUSE_LEVEL = 1e-2
FLOOR_LEVEL = 10 ** (-55 / 20)


@dataclass(frozen=True)
class Joiner:
    """Joins utterances of a training batch, up to ``most`` at a time, with pauses of up to ``pause_s`` between them.

    Which are joined depends on the batch alone: a resumed run, and a loader with workers, join the same ones.
    """

    most: int
    pause_s: float
    processor: Wav2Vec2Processor

    def __call__(self, items: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
        """The items of a batch to fewer, longer ones, every utterance in one of them; ``seed`` draws the groups."""
        generator = torch.Generator().manual_seed(seed)
        joined, rest = [], list(items)
        while rest:
            count = int(torch.randint(1, self.most + 1, (), generator=generator))
            group, rest = rest[:count], rest[count:]
            joined.append(self._join(group, generator) if len(group) > 1 else dict(group[0]))
        return joined

    def _join(self, items: Sequence[Mapping[str, Any]], generator: torch.Generator) -> dict[str, Any]:
        delimiter = torch.tensor([self.processor.tokenizer.word_delimiter_token_id])
        waves, labels = [items[0]["wav"]], [items[0]["labels"]]
        for item in items[1:]:
            samples = int(torch.rand((), generator=generator) * self.pause_s * SAMPLE_RATE)
            waves += [PAUSE_LEVEL * torch.randn(samples, generator=generator), item["wav"]]
            labels += [delimiter, item["labels"]]
        wave = torch.cat(waves)
        if self.processor.feature_extractor.do_normalize:
            wave = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
        return {
            "id": "+".join(item["id"] for item in items),
            "wav": wave,
            "labels": torch.cat(labels),
            "text": " ".join(item["text"] for item in items),
            "duration_s": len(wave) / SAMPLE_RATE,
        }


@dataclass(frozen=True)
class Recording:
    """A long recording made of utterances: what was said, and the sample at which each utterance begins."""

    samples: Tensor  # (N,) float32, 16 kHz
    text: str
    starts: tuple[int, ...]

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def join_recording(
    entries: Sequence[Mapping[str, Any]], pause_s: tuple[float, float], generator: torch.Generator
) -> Recording:
    """The utterances of manifest ``entries`` one after the other, with pauses drawn from ``pause_s`` between them.

    Low noise runs through everything, so that no edge tells where an utterance begins.
    """
    parts, starts, place = [], [], 0
    for number, entry in enumerate(entries):
        if number:
            low, high = pause_s
            parts.append(torch.zeros(int((low + (high - low) * torch.rand((), generator=generator)) * SAMPLE_RATE)))
            place += len(parts[-1])
        parts.append(read_entry(entry))
        starts.append(place)
        place += len(parts[-1])
    samples = torch.cat(parts)
    samples = samples + FLOOR_LEVEL * torch.randn(samples.shape, generator=generator)
    return Recording(samples, " ".join(entry["text"] for entry in entries if entry["text"]), tuple(starts))


def recordings(
    entries: Sequence[Mapping[str, Any]], joined: int, pause_s: tuple[float, float], *, count: int, seed: int = 0
) -> Iterator[Recording]:
    """``count`` recordings of ``joined`` utterances each, drawn in an order of their own, made as they are asked for.

    The manifest is gone through as often as it takes; the same arguments always give the same recordings.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(count):
        while len(order) < joined:
            order += torch.randperm(len(entries), generator=generator).tolist()
        yield join_recording([entries[i] for i in order[:joined]], pause_s, generator)
        order = order[joined:]
