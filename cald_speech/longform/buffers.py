"""Tensors as long as the audio, in memory or in files that are mapped into it."""

import errno
import math
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cald_speech.errors import UserError

GIB = 2**30


class Buffers:
    """Makes (T, width) buffers: on ``device``, or in the folder ``storage`` where one is given.

    A file loses its name as soon as it is mapped. It lives as long as the tensor does and leaves nothing behind,
    whatever ends the program.

    Example
    -------
    >>> buffers = Buffers(torch.float32, torch.device("cpu"), storage=tempfile.gettempdir())
    >>> buffers.new(1000, 4).shape
    torch.Size([1000, 4])
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, storage: str | Path | None = None):
        self.dtype, self.device = dtype, device
        self.storage = None if storage is None else Path(storage)

    def reserve(self, num_frames: int, width: int) -> None:
        """Look whether the disk has room for buffers of so many columns in all. Raises UserError where it has not."""
        if self.storage is None:
            return
        try:
            free = shutil.disk_usage(self.storage).free
        except OSError as error:
            raise UserError(f"storage: expected a folder that can be written, got {self.storage} ({error})") from error
        if free < self._num_bytes(num_frames, width):
            raise self._full(self._num_bytes(num_frames, width))

    def new(self, num_frames: int, width: int) -> Tensor:
        """A buffer of undefined values. Raises UserError where the disk is full or the folder cannot be written."""
        # An ordinary tensor even in inference mode: what is made there must not be written to anywhere else.
        with torch.inference_mode(False):
            if self.storage is None or num_frames * width == 0:
                return torch.empty(num_frames, width, dtype=self.dtype, device=self.device)
            return torch.frombuffer(self._mapped(num_frames, width), dtype=self.dtype).view(num_frames, width)

    def _mapped(self, num_frames: int, width: int) -> mmap.mmap:
        num_bytes = self._num_bytes(num_frames, width)
        try:
            with tempfile.TemporaryFile(prefix="cald_speech.", dir=self.storage) as file:
                # All of it now: a disk that fills up later would kill the program at some write.
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                return mmap.mmap(file.fileno(), num_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._full(num_bytes) from error
            raise UserError(f"storage: expected a folder that can be written, got {self.storage} ({error})") from error

    def _num_bytes(self, num_frames: int, width: int) -> int:
        return num_frames * width * math.ceil(torch.finfo(self.dtype).bits / 8)

    def _full(self, num_bytes: int) -> UserError:
        free = shutil.disk_usage(self.storage).free
        return UserError(
            f"storage: {self.storage} needs {num_bytes / GIB:.2f} GiB free for this audio and has {free / GIB:.2f}. "
            "Give a folder on a larger disk, a smaller dtype, or none to keep everything in memory"
        )
