"""Time and memory of models on a CPU in float32, bfloat16 and int8, in one run.

    python -m cald_speech.benchmarks.precision results/a/model results/b/model
    python -m cald_speech.benchmarks.precision

Without models: one of wav2vec2-base's size and its conversion by the default mixer, with random weights.
Every dtype hears the same noise, one sequence, with one thread; the dtypes of a model take turns, and what is told is
the median with the quartiles. *weights* is what the weights take in memory, *call* what one call takes beside them, the
most it holds at a time. Prints a table, and one JSON line last.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Wav2Vec2Config

from cald_speech.benchmarks.contest import table
from cald_speech.benchmarks.stopwatch import cpu_peak, measure_in_turns
from cald_speech.conversion import LayerMap, convert, from_pretrained
from cald_speech.conversion.int8 import Int8Linear
from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.errors import error_epilogue
from cald_speech.families import families
from cald_speech.mixers import DEFAULT

DTYPES = ("float32", "bfloat16", "int8")
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="cald_speech.benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="folders; default: two of wav2vec2-base's size, random weights")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the noise [10]")
    parser.add_argument("--repeats", type=int, default=9, help="of each dtype [9]")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with error_epilogue(), tempfile.TemporaryDirectory() as place:
        rows = []
        for folder in given.models or random_models(Path(place)):
            rows += rows_of(folder, given.seconds, given.repeats)
    print(table([tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)]))
    print(json.dumps(rows))
    return 0


def random_models(place: Path, config: Wav2Vec2Config | None = None) -> Iterator[str]:
    """Folders of a model and of what the default conversion makes of it."""
    torch.manual_seed(0)
    model = families()["wav2vec2"].load(config or Wav2Vec2Config(layerdrop=0.0))
    for name in ("teacher", "student"):
        if name == "student":
            convert(model, LayerMap(DEFAULT), initialise="random")
        model.save_pretrained(place / name)
        yield str(place / name)


def rows_of(folder: str, seconds: float, repeats: int) -> list[dict[str, Any]]:
    """A row for each dtype."""
    models = {dtype: from_pretrained(folder, dtype=getattr(torch, dtype)) for dtype in DTYPES}
    timings = measure_in_turns({d: call_of(m, seconds) for d, m in models.items()}, repeats=repeats)
    rows = []
    for dtype, model in models.items():
        peak = cpu_peak(prepare, folder, dtype, seconds)
        row = {
            "model": "/".join(Path(folder).parts[-2:]),
            "dtype": dtype,
            "ms": round(1e3 * timings[dtype].median_s, 1),
        }
        row |= {"quartiles apart": round(1e3 * timings[dtype].spread_s, 1)}
        row |= {"times float32": round(timings["float32"].median_s / timings[dtype].median_s, 2)}
        row |= {"weights MiB": round(weight_bytes(model) / MIB, 1)}
        row |= {"call MiB": "unknown" if peak is None else round(peak / MIB)}
        rows.append(row)
    return rows


def call_of(model: PreTrainedModel, seconds: float) -> Callable[[], Tensor]:
    """One forward pass over so much noise."""
    samples = torch.randn(1, int(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0)).to(model.dtype)

    def call() -> Tensor:
        with torch.inference_mode():
            return model(samples).logits

    return call


def prepare(folder: str, dtype: str, seconds: float) -> tuple[Callable, Callable]:
    """Of the process in which a call's memory is measured."""
    model = from_pretrained(folder, dtype=getattr(torch, dtype))
    return call_of(model, 1.0), call_of(model, seconds)


def weight_bytes(model: PreTrainedModel) -> int:
    """Of parameters and buffers, and of int8 weights with their scales and biases."""
    plain = sum(v.numel() * v.element_size() for v in (*model.parameters(), *model.buffers()))
    packed = [module for module in model.modules() if isinstance(module, Int8Linear)]
    return plain + sum(m.in_features * m.out_features + 3 * 4 * m.out_features for m in packed)


if __name__ == "__main__":
    sys.exit(main())
