"""What a classifier says of each utterance of a manifest.

    python -m cald_speech.evaluation.labels results/speakers/teacher/model results/speakers/data/manifests/test.json

Prints one JSON line: how many are right, of how many, the accuracy in percent and its 95 % bootstrap interval.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from speechbrain.dataio.batch import PaddedBatch

from cald_speech.checkpoints import from_pretrained
from cald_speech.data.batching import batches_by_length
from cald_speech.data.dataset import labelled_dataset
from cald_speech.data.inputs import model_inputs
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.files import whole_file
from cald_speech.tasks.bootstrap import bootstrap_interval
from cald_speech.tasks.processors import feature_extractor


def classify_folder(
    source: str | Path, manifest: str | Path, report: str | Path, *, max_batch_s: float = 60.0, device: str = "cpu"
) -> dict[str, tuple[str, str]]:
    """(label, guess) of each utterance of a manifest whose "text" is its label, also written to ``report``, as JSON.

    source : folder or hub id of a model with a classification head, whose ``id2label`` names the classes.

    Raises: UserError, for a model or manifest that cannot be used, or labels that the model does not know.
    """
    model = from_pretrained(source, head="classification").eval().to(device)
    names = [model.config.id2label[place] for place in sorted(model.config.id2label)]
    entries = read_manifest(manifest)
    strange = sorted({entry["text"] for entry in entries.values()} - set(names))
    if strange:
        raise UserError(
            f"{manifest}: expected labels of the model in {source} ({', '.join(names)}), got {', '.join(strange)} too"
        )
    extractor = feature_extractor([str(source)], None)
    dataset = labelled_dataset(entries, extractor, lambda utterance, label: torch.tensor([names.index(label)]))
    found: dict[str, tuple[str, str]] = {}
    for places in batches_by_length([entry["duration_s"] for entry in entries.values()], max_batch_s):
        batch = PaddedBatch([dataset[place] for place in places])
        with torch.inference_mode():
            guesses = model(**model_inputs(batch, model)[0]).logits.argmax(-1).tolist()
        found |= {
            utterance: (label, names[guess])
            for utterance, label, guess in zip(batch.id, batch.text, guesses, strict=True)
        }
    with whole_file(report) as unfinished:
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model with a classification head")
    parser.add_argument("manifest", type=Path, help='a recipe\'s JSON file, whose "text" is the label')
    parser.add_argument("--report", type=Path, help="where label and guess of each utterance go (beside the model)")
    args = parser.parse_args(argv)
    try:
        report = args.report or Path(args.model).parent / f"{args.manifest.stem}_labels.json"
        found = classify_folder(args.model, args.manifest, report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    right = [int(label == guess) for label, guess in found.values()]
    interval = bootstrap_interval(right, [1] * len(right)) if len(right) > 1 else None
    summary = {"model": args.model, "right": sum(right), "of": len(right), "accuracy": 100 * sum(right) / len(right)}
    print(json.dumps(summary | {"interval": interval}))


if __name__ == "__main__":
    main()
