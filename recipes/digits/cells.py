"""The grid of compare.py as values: what each cell changes in hparams/digits_grid.yaml, and what it starts from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = 200
ALIGN_STEPS = 50


@dataclass(frozen=True)
class Cell:
    """One student: ``keys`` on top of the experiment; ``student`` names the cell whose model it goes on from.

    ``mixer`` is the yaml of the mixer's factory, without the package's name, and None for that of digits.yaml.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    mixer: str | None = None
    student: str | None = None
    steps: int = STEPS
    is_result: bool = True  # False: a stage of other cells, not a row

    def arguments(self, seed: int) -> list[str]:
        """Words for train.py, but for folders."""
        words = [f"--{key}={value}" for key, value in {"seed": seed, "num_steps": self.steps, **self.keys}.items()]
        if self.mixer is not None:
            factory = f"!name:cald_speech.mixers.{self.mixer}"
            words.append(f"--layer_map=!new:cald_speech.conversion.LayerMap {{default: {factory}}}")
        return words


def schedule(steps: int) -> str:
    """The experiment's schedule over so many steps."""
    cls = "!new:cald_speech.training.schedules.WarmupSchedule"
    return f"{cls} {{warmup_steps: 20, decay_steps: {steps - 20}, shape: cosine, floor: 0.02}}"


RANDOM = {"initialise": "random"}
ALIGNED = {"align_steps": ALIGN_STEPS, "schedule": schedule(STEPS - ALIGN_STEPS)}
# All 8,000 strings, whose transcripts neither the alignment nor the layer loss looks at.
ALL_AUDIO = {"corpus": "{num_train: 8000}", "prepare_folder": "results/digits/data", "validate_every_epochs": 100}

CELLS = {
    # modes, from attention weights
    "unguided": Cell({"guidance": "unguided", "source": "null"}),
    "target": Cell({"guidance": "target"}),
    "hybrid": Cell({"guidance": "hybrid"}),
    "trajectory": Cell({"guidance": "trajectory"}),
    "waypoint": Cell({"guidance": "waypoint"}),
    "unguided from source": Cell({"guidance": "unguided"}),
    # starts
    "unguided, random": Cell({"guidance": "unguided", "source": "null"} | RANDOM),
    "target, random": Cell({"guidance": "target"} | RANDOM),
    "target, aligned": Cell({"guidance": "target"} | ALIGNED),
    "target, random, aligned": Cell({"guidance": "target"} | RANDOM | ALIGNED),
    "alignment, all audio": Cell(
        {"guidance": "alignment", "schedule": schedule(ALIGN_STEPS)} | ALL_AUDIO, steps=ALIGN_STEPS, is_result=False
    ),
    "target, aligned on all audio": Cell(
        {"guidance": "target", "schedule": schedule(STEPS - ALIGN_STEPS)},
        student="alignment, all audio",
        steps=STEPS - ALIGN_STEPS,
    ),
    "target, no labels, all audio": Cell({"guidance": "target", "alpha_task": 0.0} | ALL_AUDIO),
    # mixers, target guided from attention weights
    "target, separate projections": Cell({"guidance": "target"}, "Bidirectional {chunk_size: 32}"),
    "target, gated linear attention": Cell(
        {"guidance": "target"}, "Bidirectional {mixer: !name:cald_speech.mixers.GatedLinearAttention }"
    ),
    "target, Hydra": Cell({"guidance": "target"}, "Hydra {}"),
    "target, Mamba": Cell({"guidance": "target"}, "Bidirectional {mixer: !name:cald_speech.mixers.Mamba }"),
    "target, Linformer": Cell({"guidance": "target"}, "Linformer {k: 64, max_length: 512}"),
    "target, window of 16": Cell({"guidance": "target"}, "WindowedAttention {window: 16}"),
}
