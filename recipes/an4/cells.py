"""The grid of compare.py as values: what each cell changes in hparams/an4/student.yaml."""

from collections.abc import Mapping
from typing import Any

from cald_speech.recipes.grid import MIXERS, Cell, guided

TEACHER_STEPS = 2000  # of its fine-tuning, which the waypoints are spread over


def make_cells(steps: int) -> dict[str, Cell]:
    """The grid at so many steps for each student, but for those that say otherwise."""
    own_source, calibrated = {"source": "null"}, {"calibrate": 64}
    tenth, no_labels = {"corpus": "{share: 0.1}", "prepare_folder": "results/an4/data"}, {"alpha_task": 0.0}

    def cell(guidance: str, *keys: Mapping[str, Any], steps: int = steps, **options) -> Cell:
        return guided(guidance, steps, TEACHER_STEPS, *keys, **options)

    def by_steps(guidance: str, *keys: Mapping[str, Any]) -> dict[str, Cell]:
        numbers = (steps // 4, steps // 2, 2 * steps)
        return {f"{guidance}, {number} steps": cell(guidance, *keys, steps=number) for number in numbers}

    return {
        # modes, from attention weights; unguided from the teacher's weights too, as guided students start
        "target": cell("target"),
        "unguided": cell("unguided", own_source),
        "hybrid": cell("hybrid"),
        "trajectory": cell("trajectory"),
        "waypoint": cell("waypoint"),
        "unguided from source": cell("unguided"),
        # starts
        "target, random": cell("target", {"initialise": "random"}),
        "target, calibrated": cell("target", calibrated),
        # mixers, target guided from attention weights; "target" is Mamba-2's
        "target, gated linear attention": cell("target", mixer=MIXERS["gated_linear_attention"]),
        "target, gated DeltaNet": cell("target", mixer=MIXERS["gated_delta_net"]),
        "target, Hydra": cell("target", mixer=MIXERS["hydra"]),
        "target, Mamba": cell("target", mixer=MIXERS["mamba"]),
        "target, normalised with a window of 16": cell("target", calibrated, mixer=MIXERS["normalised_window_16"]),
        "target, Linformer": cell("target", mixer="Linformer {k: 64, max_length: 512}"),
        "target, window of 16": cell("target", mixer=MIXERS["window_16"]),
        # labels: a tenth of them; none, which leaves what the teacher says of the audio
        "target, a tenth": cell("target", tenth),
        "unguided, a tenth": cell("unguided", own_source, tenth),
        "target, no labels": cell("target", no_labels),
        # steps
        **by_steps("target"),
        **by_steps("unguided", own_source),
    }


def candidates(steps: int) -> dict[str, bool]:
    """The cells that mode and mixer are chosen of, all with all labels and equal steps: name to whether it is global.

    A window alone hears what is near, however long the recording is.
    """
    cells = make_cells(steps)
    own = {name for name, cell in cells.items() if cell.steps == steps and "corpus" not in cell.keys}
    return {name: "window" not in name or "normalised" in name for name in cells if name in own - {"target, no labels"}}
