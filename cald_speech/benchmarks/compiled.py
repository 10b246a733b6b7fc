"""``torch.compile`` against eager: a converted model on one recording, one thread, in turns.

    python -m cald_speech.benchmarks.compiled [--model FOLDER]

Without a model, random weights in a shape that options name; by default that of wav2vec2-base.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel, Wav2Vec2Config, Wav2Vec2ForCTC

from cald_speech.benchmarks.stopwatch import measure_in_turns
from cald_speech.conversion import LayerMap, convert, from_pretrained
from cald_speech.conversion.classes import config_class
from cald_speech.families import family_of
from cald_speech.mixers import DEFAULT
from cald_speech.shipped import model_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Print medians and their ratio; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m cald_speech.benchmarks.compiled", description=__doc__)
    parser.add_argument("--model", type=model_folder, help="a folder, converted first where it is not")
    parser.add_argument("--hidden_size", type=int, default=768, help="of random weights")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--channels", type=int, default=512, help="of the convolutions")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = from_pretrained(given.model) if given.model else random_model(given)
    if not isinstance(model.config, config_class(family_of(model))):
        convert(model, LayerMap(DEFAULT))
    audio = torch.randn(1, round(16_000 * given.seconds), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        far = (compiled(audio).logits - model(audio).logits).abs().max() / model(audio).logits.abs().max()
        calls = {"eager": partial(model, audio), "compiled": partial(compiled, audio)}
        timings = measure_in_turns(calls, repeats=given.repeats)
    for name, one in timings.items():
        print(f"{name:8} median {1e3 * one.median_s:.0f} ms, middle half within {1e3 * one.spread_s:.0f} ms")
    ratio = timings["compiled"].ratio_to(timings["eager"])
    print(f"compiled over eager: {ratio:.2f}; outputs differ by {far:.1e} of the largest")
    return 0


def random_model(sizes: argparse.Namespace) -> PreTrainedModel:
    """A wav2vec2 of random weights."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=sizes.hidden_size,
        intermediate_size=4 * sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        conv_dim=(sizes.channels,) * 7,
    )
    return Wav2Vec2ForCTC(config).eval()


if __name__ == "__main__":
    raise SystemExit(main())
