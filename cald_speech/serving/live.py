"""One client who speaks: 16 kHz samples of 16 bits in, words out, as :func:`cald_speech.longform.stream` gives them.

What arrives is cut into chunks of one length, whatever the messages were: with a lookahead the words depend on it. Each
client has a thread, which waits for audio most of the time.
"""

import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cald_speech.errors import UserError
from cald_speech.longform import Recogniser, Word, latency_s
from cald_speech.longform.front_end import AudioStatistics
from cald_speech.longform.source import SAMPLE_RATE
from cald_speech.serving.asked import Refused, check_model
from cald_speech.serving.work import Ended

BYTES = 2  # of a sample
WAITING_CHUNKS = 20  # beyond them the client is not read from until the model has caught up
ENCODING = "pcm_s16le"


@dataclass(frozen=True)
class LiveSettings:
    """How live audio is read.

    Arguments
    ---------
    lookahead_s : what a bidirectional model hears ahead; a causal one takes no notice.
    chunk_s : seconds that are read at once.
    statistics : by which the input is normalised, as in :func:`~cald_speech.longform.stream`.
    max_live : clients who may speak at once.
    """

    lookahead_s: float = 1.0
    chunk_s: float = 0.5
    statistics: AudioStatistics | None = None
    max_live: int = 8

    def of_stream(self) -> dict[str, Any]:
        return {"lookahead_s": self.lookahead_s, "statistics": self.statistics}


def fault_of(recogniser: Recogniser, settings: LiveSettings) -> str | None:
    """Why the model cannot read live, None where it can."""
    try:
        recogniser.live([], **settings.of_stream())
    except UserError as error:
        return str(error)
    return None


def check_start(text: str | None, model: str) -> None:
    """Look at a client's first message. Raises Refused where it is not such as ``{"sample_rate": 16000}``."""
    example = f'expected {{"sample_rate": {SAMPLE_RATE}}} as the first message'
    try:
        start = json.loads(text or "")
    except (ValueError, RecursionError):
        raise Refused(400, f"{example}, as JSON, got {'bytes' if text is None else repr(text[:40])}") from None
    if not isinstance(start, dict):
        raise Refused(400, f"{example}, got {type(start).__name__}")
    if unknown := sorted(start.keys() - {"type", "sample_rate", "encoding", "model"}):
        raise Refused(400, f"{example}, and no more than type, encoding and model, got {unknown[0][:40]!r} too")
    for key, expected in (("sample_rate", SAMPLE_RATE), ("encoding", ENCODING), ("type", "start")):
        if key not in start and key != "sample_rate":
            continue
        given = start.get(key)
        if given != expected or isinstance(given, bool):
            raise Refused(400, f"{key}: expected {expected!r}, got {str(given)[:40]!r}: resample it", param=key)
    if "model" in start:
        check_model(str(start["model"]), model)


def ready(recogniser: Recogniser, settings: LiveSettings) -> dict[str, Any]:
    """What a client is told before it speaks; words come ``latency_s`` after their end, and a chunk."""
    behind_s = latency_s(recogniser.model, settings.lookahead_s)
    return {"type": "ready", "sample_rate": SAMPLE_RATE, "latency_s": behind_s, "chunk_s": settings.chunk_s}


class Speaker:
    """The audio of one client on its way to the model, and the words on their way back."""

    def __init__(self, recogniser: Recogniser, settings: LiveSettings, **options: Any):
        self._recogniser, self._options = recogniser, options | settings.of_stream()
        self._chunk_bytes = BYTES * max(1, round(settings.chunk_s * SAMPLE_RATE))
        self._loop, self._rest, self._gone = asyncio.get_running_loop(), bytearray(), False
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._room, self._words = asyncio.Semaphore(WAITING_CHUNKS), asyncio.Queue()
        threading.Thread(target=self._run, name="speaker", daemon=True).start()

    async def hear(self, data: bytes) -> None:
        """Take the next bytes; waits while the model is far behind."""
        self._rest += data
        while len(self._rest) >= self._chunk_bytes:
            await self._room.acquire()
            self._chunks.put(bytes(self._rest[: self._chunk_bytes]))
            del self._rest[: self._chunk_bytes]

    def end(self) -> None:
        """There is no more audio. Half a sample is none."""
        if len(self._rest) >= BYTES:
            self._chunks.put(bytes(self._rest))
        self._chunks.put(None)

    def leave(self) -> None:
        """Nobody waits for words any more."""
        self._gone = True
        self._chunks.put(None)

    async def words(self) -> AsyncIterator[Word]:
        """The words, each as soon as it is over, until all audio is read."""
        while (word := await self._words.get()) is not None:
            if isinstance(word, Exception):
                raise word
            yield word

    def _run(self) -> None:
        try:
            for word in self._recogniser.live(self._samples(), **self._options):
                self._tell(word)
            self._tell(None)
        except Ended:
            return
        except Exception as error:
            self._tell(error)

    def _samples(self) -> Iterator[Tensor]:
        while (chunk := self._chunks.get()) is not None and not self._gone:
            self._later(self._room.release)
            whole = np.frombuffer(chunk, dtype="<i2", count=len(chunk) // BYTES)
            yield torch.from_numpy(whole.astype(np.float32) / 2**15)
        if self._gone:
            raise Ended

    def _tell(self, word: Word | Exception | None) -> None:
        self._later(self._words.put_nowait, word)

    def _later(self, call: Any, *given: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *given)
        except RuntimeError:  # the server has ended
            raise Ended from None
