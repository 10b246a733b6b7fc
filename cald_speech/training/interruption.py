"""SIGTERM and Ctrl-C in a training run: the running step is finished, a checkpoint saved, and the run left."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


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
