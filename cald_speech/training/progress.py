"""What a resumed run needs beside weights, optimiser and step."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks

if TYPE_CHECKING:
    from cald_speech.training.brain import CaldBrain


@register_checkpoint_hooks
class Progress:
    """The guidance's state, the best figure so far, and how many steps were skipped."""

    def __init__(self, brain: "CaldBrain"):
        self.brain = brain

    @mark_as_saver
    def save(self, path: Path) -> None:
        brain = self.brain
        state = {"guidance": brain.settings.guidance.state_dict(), "best_metric": brain.best_metric}
        torch.save(state | {"num_skipped": brain.skipped.count}, path)

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        state = torch.load(path)
        self.brain.settings.guidance.load_state_dict(state["guidance"])
        self.brain.best_metric, self.brain.skipped.count = state["best_metric"], state["num_skipped"]
