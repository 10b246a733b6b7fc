"""WER of a bidirectional student that runs live, against the seconds of audio that its backward scans hear first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Wav2Vec2Processor

from cald_speech.conversion import from_pretrained
from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import moved
from cald_speech.evaluation.by_length import evaluate_condition, joined
from cald_speech.families.hub import load_processor
from cald_speech.longform import latency_s, stream
from cald_speech.tasks.decoding import greedy
from cald_speech.tasks.reading import Reader, whole

SHORTEST_CHUNK_S = 0.5
PAUSE_S = (0.1, 0.5)


def evaluate_lookaheads(
    source: str,
    manifest: Path,
    *,
    lookaheads_s: Sequence[float],
    join: int,
    utterances: int,
    normaliser: str = "librispeech",
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row for one pass over the whole recording, and one for each lookahead, with its latency.

    ``utterances`` are joined, ``join`` in a recording. The latency is that of `cald_speech.longform.latency_s`: from
    the end of a frame's audio to its logits, the size of the chunks and the time to compute not counted.

    Raises UserError for a manifest or model that cannot be used, or a model that cannot run live.
    """
    model, processor = from_pretrained(source, head="ctc", device=device, new_head=False), load_processor(source)
    latencies: dict[str, float | None] = {"whole": None}
    readers = {"whole": whole(model, processor)}
    for seconds in lookaheads_s:
        latencies[f"{seconds:g} s"] = latency_s(model, seconds)
        readers[f"{seconds:g} s"] = live(model, processor, seconds)
    entries = list(read_manifest(manifest).values())
    recordings = joined(join, PAUSE_S).make(entries, max(1, utterances // join))
    rows = evaluate_condition(readers, recordings, normaliser)
    named = [(row.pop("model"), row) for row in rows]
    return [{"lookahead": name, "latency s": latencies[name]} | row for name, row in named]


def live(model: PreTrainedModel, processor: Wav2Vec2Processor, lookahead_s: float) -> Reader:
    """Reads samples as if they came in chunks of ``lookahead_s`` (half a second at least), normalised as they come."""
    size = int(max(SHORTEST_CHUNK_S, lookahead_s) * SAMPLE_RATE)
    do_normalize = processor.feature_extractor.do_normalize

    def read(samples: Tensor) -> str:
        logits = torch.cat(list(stream(model, samples.split(size), lookahead_s=lookahead_s, do_normalize=do_normalize)))
        return greedy(logits[None], torch.tensor([len(logits)]), processor.tokenizer)[0]

    return read


if __name__ == "__main__":
    moved("cald-speech lookahead")
