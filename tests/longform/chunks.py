"""Logits for the decoders' tests: made up, and cut into chunks."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor


def cut(logits: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """(T, V) logits as chunks of so many frames, the last one shorter."""
    for first in range(0, len(logits), size):
        yield first, logits[first : first + size]


def noisy_speech(num_frames: int, num_tokens: int = 6, seed: int = 0) -> Tensor:
    """(T, V) logits with runs of tokens and blanks (0), the likelier ones by a few nats, and some repeats."""
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randint(0, num_tokens, (num_frames,), generator=generator)
    runs[torch.rand(num_frames, generator=generator) < 0.4] = 0
    frames = runs.repeat_interleave(torch.randint(1, 4, (num_frames,), generator=generator))[:num_frames]
    noise = torch.randn(num_frames, num_tokens, generator=generator)
    return 6.0 * torch.nn.functional.one_hot(frames, num_tokens) + 1.5 * noise


def collapse(path: Iterable[int], blank: int = 0) -> tuple[int, ...]:
    """What a path says: repeats collapsed, then blanks dropped."""
    return tuple(token for token, _ in groupby(path) if token != blank)
