"""What a long run is guarded against: numbers that are not finite, and signals that come in the middle of a step."""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cald_speech.errors import UserError
from cald_speech.ops import mask_padding
from cald_speech.training.distributed import lowest, own_part

logger = logging.getLogger(__name__)


def first_nonfinite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds NaN or infinity; None where all are finite, on every rank.

    Example
    -------
    >>> model = nn.Linear(2, 2)
    >>> model.bias.data[0] = float("nan")
    >>> first_nonfinite(model)
    'bias'
    """
    tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    finite = lowest(torch.stack([own_part(t).isfinite().all() for t in tensors.values()]).float()).tolist()
    return next((name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite), None)


def finite_items(outputs: Tensor, lengths: Tensor | None) -> list[bool]:
    """Of each utterance, whether all its outputs (B, ...) are finite; of (B, T, V) in its ``lengths`` frames.

    Example
    -------
    >>> finite_items(torch.tensor([[[1.0], [float("nan")]]] * 2), torch.tensor([1, 2]))
    [True, False]
    """
    return mask_padding(outputs, lengths).isfinite().flatten(1).all(1).tolist()


class SkippedSteps:
    """``count`` steps were skipped so far; ``patience`` in a row are too many.

    Example
    -------
    >>> skipped = SkippedSteps(patience=2)
    >>> skipped.skip(7, ["a", "b"], way_back=str)
    >>> skipped.taken()  # a good step in between
    >>> skipped.count
    1
    """

    def __init__(self, patience: int):
        self.patience, self.count, self.in_a_row = patience, 0, 0

    def taken(self) -> None:
        """A step was finite."""
        self.in_a_row = 0

    def skip(self, step: int, utterances: Sequence[str], way_back: Callable[[], str]) -> None:
        """A step was not. Raises UserError, with its utterances and the way back, at the end of the patience."""
        self.count += 1
        self.in_a_row += 1
        logger.warning(
            "step %d: loss or gradient is not finite, step skipped (%d so far); utterances: %s",
            *(step, self.count, " ".join(utterances)),
        )
        if self.in_a_row >= self.patience:
            raise UserError(
                f"{self.in_a_row} optimiser steps in a row had a loss or gradient that is not finite, the last at "
                f"step {step}, with the utterances {' '.join(utterances)}. Look at these utterances, lower "
                f"learning_rate, or use --precision=fp32. {way_back()}"
            )


class Interruption:
    """``signal`` is the number of the signal that came inside :meth:`watched`, or None.

    Example
    -------
    >>> interruption = Interruption()
    >>> with interruption.watched():
    ...     signal.raise_signal(signal.SIGTERM)
    >>> interruption.signal == signal.SIGTERM
    True
    """

    def __init__(self):
        self.signal: int | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a first SIGTERM or Ctrl-C is remembered; a second one leaves at once, as KeyboardInterrupt."""

        def remember(number, frame):
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number

        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
