"""WER of a bidirectional student that runs live, against the seconds of audio that its backward scans hear first.

    python -m cald_speech.evaluation.lookahead results/digits/target-seed0/model \\
        --manifest results/digits/data/manifests/test.json

Utterances are joined with short pauses, and read live with each lookahead in turn; `whole` is one pass over the whole
recording. With each lookahead stands the latency from the end of a frame's audio to its logits, the size of the chunks
and the time to compute not counted. Prints a table, and one JSON line last.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, Wav2Vec2Processor

from cald_speech.conversion import from_pretrained
from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.data.manifests import manifest_hash, read_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation.by_length import evaluate_condition
from cald_speech.evaluation.conditions import by_length as joined
from cald_speech.evaluation.report import format_table
from cald_speech.files import whole_file
from cald_speech.longform import stream
from cald_speech.longform.live import latency_s
from cald_speech.tasks.decoding import greedy
from cald_speech.tasks.reading import Reader, load_processor, whole

SHORTEST_CHUNK_S = 0.5
PAUSE_S = (0.1, 0.5)


def live(model: PreTrainedModel, processor: Wav2Vec2Processor, lookahead_s: float) -> Reader:
    """Reads samples as if they came in chunks of ``lookahead_s`` (half a second at least), normalised as they come."""
    size = int(max(SHORTEST_CHUNK_S, lookahead_s) * SAMPLE_RATE)
    do_normalize = processor.feature_extractor.do_normalize

    def read(samples: Tensor) -> str:
        logits = torch.cat(list(stream(model, samples.split(size), lookahead_s=lookahead_s, do_normalize=do_normalize)))
        return greedy(logits[None], torch.tensor([len(logits)]), processor.tokenizer)[0]

    return read


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument)
    add("model", help="folder of a converted model")
    add("--manifest", type=Path, required=True, help="utterances to join, with their texts")
    add("--lookaheads", type=float, nargs="+", default=[0.0, 0.25, 0.5, 1.0, 2.0, 4.0], help="seconds")
    add("--join", type=int, default=8, help="utterances of a recording")
    add("--utterances", type=int, default=256, help="utterances in all")
    add("--normaliser", default="librispeech")
    add("--output_folder", type=Path, default=Path("results/lookahead"))
    args = parser.parse_args(argv)
    try:
        model, processor = from_pretrained(args.model), load_processor(args.model)
        readers = {"whole": whole(model, processor)}
        latencies = {"whole": None}
        for seconds in args.lookaheads:
            latencies[f"{seconds:g} s"] = latency_s(model, seconds)
            readers[f"{seconds:g} s"] = live(model, processor, seconds)
        entries = list(read_manifest(args.manifest).values())
        made = joined(args.join, PAUSE_S).make(entries, max(1, args.utterances // args.join))
        rows = evaluate_condition(readers, made, args.normaliser)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    rows = [{"lookahead": row.pop("model"), "latency s": None} | row for row in rows]
    for row in rows:
        row["latency s"] = latencies[row["lookahead"]]
    with whole_file(args.output_folder / "lookahead.json") as unfinished:
        unfinished.write_text(json.dumps(rows, indent=2) + "\n")
    print(format_table(rows))
    print(json.dumps({"model": args.model, "manifest": manifest_hash(args.manifest)[:12], "rows": rows}))


if __name__ == "__main__":
    main()
