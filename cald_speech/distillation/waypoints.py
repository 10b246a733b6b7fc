"""Checkpoints that a teacher left on its way: which there are, whether they fit, and how one is taken over."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

_NAME = re.compile(r"step-(\d+)")


class Waypoints:
    """The folders ``step-<optimiser step>`` that a run with ``waypoint_every_steps`` writes, in order.

    Raises
    ------
    ValueError
        which names the key to mend, where there are none or one is missing between two others.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        places = self.folder.iterdir() if self.folder.is_dir() else ()
        found = {int(match[1]): place for place in places if (match := _NAME.fullmatch(place.name))}
        self.folders = dict(sorted(found.items()))
        if not self.folders:
            raise ValueError(
                f"waypoints: expected folders called step-<number> in {self.folder}, and there are none. Fine-tune a "
                "teacher with --waypoint_every_steps, and give its output_folder/waypoints"
            )
        steps = list(self.folders)
        between = steps[0]
        missing = [step for step in range(between, steps[-1], between) if step not in self.folders]
        if missing or steps[-1] % between:
            raise ValueError(
                f"waypoints: expected one every {between} steps in {self.folder}, as the first says, but got the steps "
                f"{', '.join(map(str, steps))}. Train the teacher again, or leave only those of one run there"
            )

    def ahead_of(self, step: float) -> Path:
        """The first waypoint later than ``step``; beyond the last, the last."""
        return next((folder for at, folder in self.folders.items() if at > step), list(self.folders.values())[-1])

    def check_fit(self, teacher: nn.Module) -> None:
        """Raise ValueError for the first waypoint that is not a checkpoint of a model like ``teacher``."""
        expected = {name: list(v.shape) for name, v in teacher.state_dict().items()}
        tied = _tied(teacher)
        for folder in self.folders.values():
            try:
                with safe_open(folder / "model.safetensors", framework="pt") as weights:
                    got = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ValueError(f"waypoints: cannot read {folder / 'model.safetensors'}: {error}") from error
            # Of weights that are one and the same, a folder holds the first.
            got |= {name: got[other] for name in expected for other in tied[name] if other in got}
            unlike = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
            if unlike:
                raise ValueError(
                    f"waypoints: {folder} is of another model than the teacher: {len(unlike)} weights differ, the "
                    f"first is {unlike[0]}, {got.get(unlike[0], 'missing')} for {expected.get(unlike[0], 'none')}. "
                    "Give `teacher` the model that came out of the same run"
                )


def take_over(teacher: nn.Module, folder: Path) -> None:
    """Give ``teacher`` the weights in ``folder``, which fit it, in place."""
    weights, tied = load_file(folder / "model.safetensors"), _tied(teacher)
    weights |= {name: weights[other] for name in tied for other in tied[name] if other in weights}
    teacher.load_state_dict(weights)


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """The names of each entry of the state dict, its own among them, that stand for the same tensor."""
    same: dict[tuple, list[str]] = {}
    values = model.state_dict()
    for name, value in values.items():
        same.setdefault((value.data_ptr(), value.shape), []).append(name)
    return {name: same[value.data_ptr(), value.shape] for name, value in values.items()}
