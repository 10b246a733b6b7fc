"""WER against duration, and under stress: does a model that was trained on short utterances read long recordings?

    python -m cald_speech.evaluation.by_length results/digits/teacher/model results/digits/target-seed0/model \\
        --manifest results/digits/data/manifests/test.json --output_folder results/by_length

Utterances of a manifest are joined x 1, x 2, x 4, ... with short pauses, and with pauses of 0.5 to 30 s. Every model
reads the same recordings; each as ``--readers`` says: ``whole`` in one forward pass, ``long-form`` the same in bounded
memory, ``chunks`` cut into overlapping pieces. Prints a table, and one JSON line last; draws a figure.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cald_speech.conversion import from_pretrained
from cald_speech.data.joining import Recording
from cald_speech.data.manifests import manifest_hash, read_manifest
from cald_speech.data.text import normalise
from cald_speech.errors import UserError
from cald_speech.evaluation.conditions import STRESS, Condition, Entries
from cald_speech.evaluation.conditions import by_length as joined
from cald_speech.evaluation.figures import draw_by_length
from cald_speech.evaluation.report import format_table
from cald_speech.files import whole_file
from cald_speech.tasks.reading import READERS, Reader, load_processor
from cald_speech.tasks.wer import score

PAUSES = {"pauses to 0.5 s": (0.1, 0.5), "pauses to 30 s": (0.5, 30.0)}


def evaluate_condition(readers: dict[str, Reader], recordings: Iterator[Recording], normaliser: str) -> list[dict]:
    """One row for each reader: WER, insertions and deletions per minute, over the recordings of one condition."""
    references, durations_s = {}, {}
    hypotheses: dict[str, dict[str, str]] = {name: {} for name in readers}
    for number, recording in enumerate(recordings):
        key = f"{number:05d}"
        references[key], durations_s[key] = normalise(recording.text, normaliser), recording.duration_s
        for name, read in readers.items():
            hypotheses[name][key] = normalise(read(recording.samples), normaliser)
    rows, minutes = [], sum(durations_s.values()) / 60
    for name, texts in hypotheses.items():
        result = score(references, texts, durations_s=durations_s)
        low, high = result.interval() or (None, None)
        rows.append({"model": name, "recordings": len(references), "s each": 60 * minutes / len(references)})
        rows[-1] |= {"words": result.words.count, "WER %": result.words.rate, "low": low, "high": high}
        rows[-1] |= {"ins/min": result.words.insertions / minutes, "del/min": result.words.deletions / minutes}
    return rows


def conditions(joins: Sequence[int]) -> dict[str, Condition]:
    """Every condition by name, in the order of the table."""
    longer = {f"x {n}, {name}": joined(n, pause) for name, pause in PAUSES.items() for n in joins}
    return longer | {f"stress: {name}": condition for name, condition in STRESS.items()}


def load_readers(folders: Sequence[str], names: Sequence[str]) -> dict[str, Reader]:
    readers = {}
    for folder in folders:
        model, processor = from_pretrained(folder), load_processor(folder)
        readers |= {f"{folder} ({name})": READERS[name](model, processor) for name in names}
    return readers


def run(readers: dict[str, Reader], entries: Entries, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every condition, with the same number of utterances in each: ``args.utterances``."""
    rows = []
    for name, condition in tqdm(conditions(args.joins).items(), unit="condition", disable=args.quiet):
        made = condition.make(entries, max(1, args.utterances // condition.joined))
        found = evaluate_condition(readers, made, args.normaliser)
        rows += [{"condition": name, "joined": condition.joined} | row for row in found]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument)
    add("models", nargs="+", help="model folders")
    add("--manifest", type=Path, required=True, help="utterances to join, with their texts")
    add("--joins", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--utterances", type=int, default=512, help="utterances in each condition, however they are joined")
    add("--readers", nargs="+", choices=sorted(READERS), default=["long-form"])
    add("--normaliser", default="librispeech")
    add("--output_folder", type=Path, default=Path("results/by_length"))
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    try:
        entries = list(read_manifest(args.manifest).values())
        rows = run(load_readers(args.models, args.readers), entries, args)
        with whole_file(args.output_folder / "by_length.json") as unfinished:
            unfinished.write_text(json.dumps(rows, indent=2) + "\n")
        draw_by_length(rows, args.output_folder / "by_length.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(format_table(rows))
    print(json.dumps({"manifest": manifest_hash(args.manifest)[:12], "rows": rows}))


if __name__ == "__main__":
    main()
