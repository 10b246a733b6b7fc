"""The line in front of the model: one recording is read at a time, some wait, and who leaves is taken out at once.

The work runs in a thread. It is told to end by what its ``look`` raises, which it calls after every block.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from cald_speech.serving.asked import Refused
from cald_speech.serving.upload import ClientLeft

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Look = Callable[[], None]
LONGEST_RETRY_S = 60


class Ended(Exception):
    """Raised inside the work, by its ``look``: nobody waits for it any more."""


class Line:
    """Who may come in, and who is being served. ``max_waiting`` requests are let in beside the one that is served.

    Example
    -------
    >>> line = Line(max_waiting=0)
    >>> with line.place():
    ...     line.inside
    1
    """

    def __init__(self, max_waiting: int):
        self.max_waiting, self.inside, self.running = max_waiting, 0, 0
        self.served, self.ended, self.usual_s = 0, 0, 1.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recordings")
        self._flags: set[threading.Event] = set()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line, from the first byte of the upload to the answer. Raises Refused where it is full."""
        if self.inside > self.max_waiting:
            wait_s = min(LONGEST_RETRY_S, max(1, math.ceil(self.usual_s * self.inside)))
            raise Refused(
                503,
                f"{self.inside} recordings are being read or wait, as many as this server takes (--max_queue): try "
                f"again in {wait_s} s",
                code="queue_full",
                headers={"Retry-After": str(wait_s)},
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def run(self, work: Callable[[Look], Result], leaves: Callable[[], Awaitable[None]]) -> Result:
        """What ``work(look)`` gives, in its turn.

        Where ``leaves`` is over first, the work is ended and ClientLeft raised once it has ended: what it reads may
        be thrown away then.
        """
        flag = threading.Event()
        self._flags.add(flag)
        future = self._thread.submit(self._work, work, flag)
        waited, gone = asyncio.wrap_future(future), asyncio.ensure_future(leaves())
        try:
            await asyncio.wait({waited, gone}, return_when=asyncio.FIRST_COMPLETED)
            if waited.done():
                return waited.result()
            raise ClientLeft
        finally:
            flag.set()
            gone.cancel()
            if not waited.done() and not future.cancel():
                await asyncio.wait({waited})
            if waited.done() and not waited.cancelled():
                waited.exception()  # looked at, so that asyncio does not complain
            self._flags.discard(flag)

    def close(self) -> None:
        """End what runs and waits."""
        for flag in self._flags:
            flag.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _work(self, work: Callable[[Look], Result], flag: threading.Event) -> Result:
        def look() -> None:
            if flag.is_set():
                raise Ended

        start, self.running = time.monotonic(), 1
        try:
            look()
            result = work(look)
            self.served += 1
            self.usual_s += 0.2 * (time.monotonic() - start - self.usual_s)
            return result
        except (Ended, Refused) as error:
            self.ended += isinstance(error, Ended)
            # Its traceback has the frames of the work, and so its buffers and open files.
            raise error.with_traceback(None) from None
        finally:
            self.running = 0
