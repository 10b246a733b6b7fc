"""A plain log and TensorBoard, both by optimiser step, both taken up at the right step by a resumed run."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cald_speech.errors import UserError
from cald_speech.files import whole_file


class StepLog:
    """Writes numbers to ``train_log.jsonl`` (one JSON object a line) and to ``tensorboard/`` in ``folder``.

    Lines at or after ``first_step``, left by a run that was killed after its last checkpoint, are dropped, and so is
    a last line that it did not finish.

    Raises UserError where the log cannot be written.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> log = StepLog(folder, first_step=0)
    >>> log.write(0, {"loss/task": 3.5})
    >>> (folder / "train_log.jsonl").read_text()
    '{"step": 0, "loss/task": 3.5}\\n'
    """

    def __init__(self, folder: Path, first_step: int):
        self.path = folder / "train_log.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] < first_step]
            with whole_file(self.path) as unfinished:
                unfinished.write_text("".join(kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        try:
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"step": step, **rounded}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error}. The last good checkpoint is still there: make room and start the "
                "same command again to go on from it"
            ) from error
