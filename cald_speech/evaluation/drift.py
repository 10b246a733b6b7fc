"""How far fine-tuning moves a model's hidden states, layer by layer, and the guidance mode which that speaks for.

    python -m cald_speech.evaluation.drift results/digits/teacher/model results/digits/teacher_start/model \\
        results/digits/data/manifests/valid.json --output results/drift

Reads the same audio, or the tokens of a set (MANIFEST is then its JSON file), with the pretrained SOURCE and the
fine-tuned TEACHER and prints the cosine distance between their hidden states after each layer (before any final norm),
mean over frames or tokens; with --waypoints also how far each checkpoint of the fine-tuning is from both. SOURCE needs
no head. The paper (arXiv 2410.06846) names no border between a large and a small distance: those used here are our
reading (cald_speech/distillation/drift.py). Its 0.372 was seen after 2,000 steps; the waypoints show how far a teacher
had gone by then.

Writes drift.json and drift.png into --output; prints tables, the suggestion, and one JSON line last.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from cald_speech.data.batching import Audio, Modality
from cald_speech.data.dataset import make_dataset
from cald_speech.data.tokens import TokenBlocks, Tokens, TokenSet
from cald_speech.distillation.drift import LARGE, PUBLISHED_ON_SPEECH, SMALL, cosine_distances, suggest
from cald_speech.distillation.waypoints import Waypoints
from cald_speech.errors import UserError
from cald_speech.evaluation.forward import (
    Mean,
    batches,
    check_comparable,
    check_unconverted,
    chosen,
    load,
    states_and_output,
)
from cald_speech.evaluation.layer_command import add_common_options, made_and_written
from cald_speech.evaluation.layer_figures import draw_drift
from cald_speech.evaluation.report import format_table
from cald_speech.tasks.reading import load_processor

Models = Mapping[str, PreTrainedModel]
Pair = tuple[str, str]


class Drift:
    """Distances between models over the same utterances of a manifest."""

    def __init__(self, args: argparse.Namespace):
        self.dataset, self.modality = _opened(args.manifest, str(args.teacher))
        self.places = chosen(len(self.dataset), args.utterances)
        self.max_batch, self.quiet = getattr(args, self.modality.batch_limit), args.quiet

    def between(self, models: Models, pairs: Sequence[Pair], name: str) -> tuple[dict[Pair, list[float]], int]:
        """The mean distance in each layer, first to last, for each pair of names, and the number of frames."""
        means = {pair: Mean() for pair in pairs}
        first = next(iter(models.values()))
        with tqdm(total=len(self.places), unit="utt", desc=name, disable=self.quiet) as bar:
            for batch in batches(self.dataset, self.places, first, self.max_batch, self.modality):
                states = {key: states_and_output(model, batch)[0] for key, model in models.items()}
                for one, other in pairs:
                    means[one, other].add(*cosine_distances(states[one], states[other], batch.lengths))
                bar.update(len(batch.ids))
        return {pair: mean.values() for pair, mean in means.items()}, means[pairs[0]].count


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Every figure, as it goes into drift.json. Raises UserError for models that cannot be compared, or bad data."""
    folders = _waypoints(args.waypoints)
    models = {name: _load(folder, args.device) for name, folder in (("source", args.source), ("teacher", args.teacher))}
    # The messages name folders: "source" would not say which of three is meant.
    check_comparable({str(args.teacher): models["teacher"], str(args.source): models["source"]})
    drift = Drift(args)
    found, num_frames = drift.between(models, [("source", "teacher")], "source, teacher")
    layers = found["source", "teacher"]
    waypoints = []
    for step, folder in folders.items():
        waypoint = _load(folder, args.device)
        check_comparable({str(args.teacher): models["teacher"], str(folder): waypoint})
        pairs = [("source", "waypoint"), ("waypoint", "teacher")]
        found, _ = drift.between({**models, "waypoint": waypoint}, pairs, f"step {step}")
        waypoints.append({"step": step, "from_source": found[pairs[0]], "to_teacher": found[pairs[1]]})
    return {
        "teacher": str(args.teacher),
        "source": str(args.source),
        "manifest": str(args.manifest),
        "manifest_hash": drift.modality.fingerprint(args.manifest),
        "num_utterances": len(drift.places),
        "num_frames": num_frames,
        "layers": layers,
        "mean": fmean(layers),
        "waypoints": waypoints,
        "suggestion": asdict(suggest(fmean(layers))),
        "borders": {"small": SMALL, "large": LARGE, "published_on_speech": PUBLISHED_ON_SPEECH},
    }


def _opened(manifest: Path, teacher: str) -> tuple[Dataset, Modality]:
    """What a set holds: tokens, if its JSON file says how many make a block, else audio."""
    try:
        is_tokens = "block_tokens" in json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        is_tokens = False  # and read_manifest() says what is wrong
    if is_tokens:
        return TokenBlocks(TokenSet.read(manifest)), Tokens()
    # What the vocabulary cannot write does not matter: only the audio is read.
    return make_dataset(manifest, load_processor(teacher), unknown="drop"), Audio()


def _load(folder: str | Path, device: str) -> PreTrainedModel:
    model = load(folder, device, head="base")
    check_unconverted(str(folder), model)
    return model


def _waypoints(folder: Path | None) -> dict[int, Path]:
    if folder is None:
        return {}
    try:
        return Waypoints(folder).folders
    except ValueError as error:
        raise UserError(f"--{error}") from error


def tables(found: Mapping[str, Any]) -> str:
    """The distances for people: layer by layer, and over the waypoints."""
    rows = [{"layer": str(i), "cosine distance": f"{value:.4f}"} for i, value in enumerate(found["layers"])]
    rows.append({"layer": "mean", "cosine distance": f"{found['mean']:.4f}"})
    text = format_table(rows)
    if found["waypoints"]:
        steps = [
            {
                "step": waypoint["step"],
                "from source": f"{fmean(waypoint['from_source']):.4f}",
                "to teacher": f"{fmean(waypoint['to_teacher']):.4f}",
            }
            for waypoint in found["waypoints"]
        ]
        text += f"\n\nMeans over the layers, waypoint by waypoint:\n\n{format_table(steps)}"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="folder or hub id of the fine-tuned model, with its processor")
    add("source", metavar="SOURCE", help="folder or hub id of the pretrained model that it was fine-tuned from")
    add("manifest", metavar="MANIFEST", type=Path, help="utterances to read; their texts do not matter")
    add("--max_batch_tokens", type=int, default=8192, help="of text in a batch, padding counted (8192)")
    add("--waypoints", type=Path, help="folder with step-<number> checkpoints of the fine-tuning")
    add_common_options(parser, output="results/drift")
    args = parser.parse_args(argv)
    found = made_and_written(report, draw_drift, "drift", args)
    print(tables(found))
    certainty = "suggested" if found["suggestion"]["clear"] else "suggested, uncertainly"
    print(f"\nguidance {certainty}: {', '.join(found['suggestion']['modes'])}; {found['suggestion']['reason']}.\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
