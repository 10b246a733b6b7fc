"""How far fine-tuning moves a model's hidden states, layer by layer, and the guidance mode which that speaks for.

The measure is the cosine distance between the hidden states after each layer (before any final norm), mean over frames
or tokens. The paper (arXiv 2410.06846) names no border between a large and a small distance: those used here are our
reading (cald_speech/distillation/drift.py). Its 0.372 was seen after 2,000 steps; the waypoints show how far a teacher
had gone by then.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from cald_speech.conversion import from_pretrained, load_config
from cald_speech.data.batching import Audio, Modality
from cald_speech.data.encodings import read_text
from cald_speech.data.tokens import TokenBlocks, Tokens, TokenSet
from cald_speech.distillation.drift import LARGE, PUBLISHED_ON_SPEECH, SMALL, cosine_distances, suggest
from cald_speech.distillation.waypoints import Waypoints
from cald_speech.errors import UserError, moved
from cald_speech.evaluation.forward import (
    Mean,
    batches,
    check_comparable,
    check_unconverted,
    chosen,
    states_and_output,
)
from cald_speech.evaluation.report import format_table
from cald_speech.families import family_of
from cald_speech.tasks.encoding import Encoding
from cald_speech.tasks.processors import feature_extractor

Models = Mapping[str, PreTrainedModel]
Pair = tuple[str, str]


def measure_drift(
    teacher: str,
    source: str,
    manifest: Path,
    *,
    waypoints: Path | None = None,
    utterances: int = 200,
    max_batch_s: float = 60.0,
    max_batch_tokens: int = 8192,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Every figure of the drift from a pretrained model to the fine-tuned one, in the form of drift.json.

    Arguments
    ---------
    teacher, source : folders or hub ids of the fine-tuned model, with its processor, and of the pretrained one, which
        needs no head.
    manifest : the audio that both read, or the JSON file of a token set. Texts do not matter.
    waypoints : a folder with step-<number> checkpoints of the fine-tuning; their distances to both are measured too.
    utterances : how many are read, evenly spread over the manifest.

    Raises
    ------
    UserError
        for models that cannot be compared, or bad data.
    """
    folders = _waypoints(waypoints)
    models = {"source": _load(source, device), "teacher": _load(teacher, device)}
    # The messages name folders: "source" would not say which of three is meant.
    check_comparable({teacher: models["teacher"], source: models["source"]})
    dataset, modality = _opened(manifest, teacher)
    limit = {"max_batch_s": max_batch_s, "max_batch_tokens": max_batch_tokens}[modality.batch_limit]
    reading = _Reading(dataset, modality, chosen(len(dataset), utterances), limit, progress)
    found, num_frames = reading.distances(models, [("source", "teacher")], "source, teacher")
    layers = found["source", "teacher"]
    steps = []
    for step, folder in folders.items():
        waypoint = _load(folder, device)
        check_comparable({teacher: models["teacher"], str(folder): waypoint})
        pairs = [("source", "waypoint"), ("waypoint", "teacher")]
        found, _ = reading.distances({**models, "waypoint": waypoint}, pairs, f"step {step}")
        steps.append({"step": step, "from_source": found[pairs[0]], "to_teacher": found[pairs[1]]})
    return {
        "teacher": teacher,
        "source": source,
        "manifest": str(manifest),
        "manifest_hash": modality.fingerprint(manifest),
        "num_utterances": len(reading.places),
        "num_frames": num_frames,
        "layers": layers,
        "mean": fmean(layers),
        "waypoints": steps,
        "suggestion": asdict(suggest(fmean(layers))),
        "borders": {"small": SMALL, "large": LARGE, "published_on_speech": PUBLISHED_ON_SPEECH},
    }


@dataclass(frozen=True)
class _Reading:
    """Which items are read, and in what batches."""

    dataset: Dataset
    modality: Modality
    places: Sequence[int]
    max_batch: float
    progress: bool

    def distances(self, models: Models, pairs: Sequence[Pair], name: str) -> tuple[dict[Pair, list[float]], int]:
        """The mean distance in each layer, first to last, for each pair of names, and the number of frames."""
        means = {pair: Mean() for pair in pairs}
        first = next(iter(models.values()))
        with tqdm(total=len(self.places), unit="utt", desc=name, disable=not self.progress) as bar:
            for batch in batches(self.dataset, first, self.max_batch, modality=self.modality, places=self.places):
                states = {key: states_and_output(model, batch)[0] for key, model in models.items()}
                for one, other in pairs:
                    means[one, other].add(*cosine_distances(states[one], states[other], batch.layer_lengths))
                bar.update(len(batch.ids))
        return {pair: mean.values() for pair, mean in means.items()}, means[pairs[0]].count


def _opened(manifest: Path, teacher: str) -> tuple[Dataset, Modality]:
    """What a set holds: tokens, if its JSON file says how many make a block, else audio."""
    try:
        is_tokens = "block_tokens" in json.loads(read_text(manifest))
    except (UserError, ValueError, TypeError, RecursionError):
        is_tokens = False  # and read_manifest() says what is wrong
    if is_tokens:
        return TokenBlocks(TokenSet.read(manifest)), Tokens()
    # Only the audio is read: a teacher that classifies has no tokenizer.
    extractor = feature_extractor([teacher], teacher)
    return Encoding().dataset(manifest, extractor, normaliser="none", unknown="drop"), Audio()


def _load(folder: str | Path, device: str) -> PreTrainedModel:
    heads = family_of(load_config(str(folder))).heads
    # The states are the same with a head; Parakeet's encoder alone is no model of its family.
    model = from_pretrained(folder, head="base" if "base" in heads else heads[0], device=device)
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


if __name__ == "__main__":
    moved("cald-speech drift")
