"""The grid of compare.py as values: what each cell changes in hparams/digits/grid.yaml, and what it starts from."""

from collections.abc import Mapping
from typing import Any

from cald_speech.recipes.grid import Cell, guided, schedule

TEACHER_STEPS = 8000  # of its fine-tuning, which the waypoints are spread over


def make_cells(steps: int) -> dict[str, Cell]:
    """The grid at so many steps for each student, a quarter of them for slot alignment where there is one."""
    align_steps = steps // 4
    left = steps - align_steps
    random, own_source = {"initialise": "random"}, {"source": "null"}
    aligned = {"align_steps": align_steps, "schedule": schedule(left)}
    # All 8,000 strings, whose transcripts neither slot alignment nor the layer loss looks at.
    own_words = {"corpus": "{num_train: 8000, transcripts_of: results/digits/teacher/model}"}
    all_audio = {"corpus": "{num_train: 8000}", "prepare_folder": "results/digits/data", "validate_every_epochs": 100}

    def cell(guidance: str, *keys: Mapping[str, Any], steps: int = steps, **options) -> Cell:
        return guided(guidance, steps, TEACHER_STEPS, *keys, **options)

    def with_mixer(mixer: str) -> Cell:
        return cell("target", mixer=mixer)

    return {
        # modes, from attention weights; unguided from the teacher's weights too, as guided students start
        "unguided": cell("unguided", own_source),
        "target": cell("target"),
        "hybrid": cell("hybrid"),
        "trajectory": cell("trajectory"),
        "waypoint": cell("waypoint"),
        "unguided from source": cell("unguided"),
        # starts
        "unguided, random": cell("unguided", own_source, random),
        "target, random": cell("target", random),
        "target, aligned": cell("target", aligned),
        "target, random, aligned": cell("target", random, aligned),
        "alignment, all audio": cell("alignment", all_audio, steps=align_steps, is_result=False),
        "target, aligned on all audio": cell("target", steps=left, student="alignment, all audio"),
        "target, no labels, all audio": cell("target", {"alpha_task": 0.0}, all_audio),
        # what all audio gives without labels, each part alone: the teacher's words, its outputs, its states
        "teacher's words, all audio": cell("unguided", own_source, all_audio, own_words),
        "target, KL alone, all audio": cell("target", {"alpha_task": 0.0, "alpha_layer": 0.0}, all_audio),
        "target, layers alone, all audio": cell("target", {"alpha_task": 0.0, "alpha_logits": 0.0}, all_audio),
        # mixers, target guided from attention weights
        "target, separate projections": with_mixer("Bidirectional {chunk_size: 32}"),
        "target, gated linear attention": with_mixer(
            "Bidirectional {mixer: !name:cald_speech.mixers.GatedLinearAttention }"
        ),
        "target, Hydra": with_mixer("Hydra {}"),
        "target, Mamba": with_mixer("Bidirectional {mixer: !name:cald_speech.mixers.Mamba }"),
        "target, Linformer": with_mixer("Linformer {k: 64, max_length: 512}"),
        "target, window of 16": with_mixer("WindowedAttention {window: 16}"),
        "target, window of 16, no labels, all audio": cell(
            "target", {"alpha_task": 0.0}, all_audio, mixer="WindowedAttention {window: 16}"
        ),
    }
