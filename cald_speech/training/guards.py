"""What a long run is guarded against: steps that are not finite, and signals that come in the middle of one."""

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cald_speech.errors import UserError

logger = logging.getLogger(__name__)


class SkippedSteps:
    """``count`` steps were skipped so far; ``patience`` in a row are too many.

    Example
    -------
    >>> skipped = SkippedSteps(patience=2)
    >>> skipped.skip(7, ["a", "b"])
    >>> skipped.taken()  # a good step in between
    >>> skipped.count
    1
    """

    def __init__(self, patience: int):
        self.patience, self.count, self.in_a_row = patience, 0, 0

    def taken(self) -> None:
        """A step was finite."""
        self.in_a_row = 0

    def skip(self, step: int, utterances: Sequence[str]) -> None:
        """A step was not. Raises UserError, with its utterances, at the end of the patience."""
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
                "learning_rate, or use --precision=fp32. The last checkpoint is from before"
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
