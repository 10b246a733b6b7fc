"""One layer over all frames, in place: a mixer sweeps through them in blocks, attention takes its queries in blocks.

:class:`Frames` are the buffers that this happens in, as long as the audio: in memory, or in files mapped into it
(:class:`Buffers`).
"""

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families import BlockAttention, Opened, SpeechFamily
from cald_speech.mixers import Sweep

GIB = 2**30


class Frames:
    """Buffers as long as the audio, read and written a block at a time: the layers' input, and spare ones beside it.

    ``spare_widths`` are the columns of each spare buffer; ``block`` is the number of frames the layers take at once;
    ``device`` is the model's. ``squeezed`` frames will make one of the layers'.
    """

    def __init__(
        self,
        num_frames: int,
        width: int,
        spare_widths: list[int],
        block: int,
        buffers: "Buffers",
        device: torch.device,
        squeezed: int = 1,
    ):
        self.num_frames, self.width, self.block, self.device = num_frames, width, block, device
        self.x = buffers.new(num_frames, width)
        self._spare = [buffers.new(num_frames // squeezed, columns) for columns in spare_widths]

    def squeeze(self, factor: int) -> None:
        """From here on the frames are the layers', of which there are fewer by the factor."""
        self.num_frames //= factor
        self.x = self.x[: self.num_frames]

    def spare(self, number: int, width: int) -> Tensor:
        """Room for what a layer keeps for every frame, (T, width); every layer has the same buffers."""
        return self._spare[number].flatten()[: self.num_frames * width].view(self.num_frames, width)

    def frame(self) -> Tensor:
        """One frame of zeros, (1, 1, D)."""
        return self.x.new_zeros(1, 1, self.width, device=self.device)

    def blocks(self, *, reverse: bool = False, whole: bool = False) -> Iterator[slice]:
        size = max(1, self.num_frames) if whole else self.block
        starts = range(0, self.num_frames, size)
        return (slice(a, min(a + size, self.num_frames)) for a in (reversed(starts) if reverse else starts))

    def read(self, buffer: Tensor, frames: slice) -> Tensor:
        """(1, t, width) on the model's device."""
        return buffer[None, frames].to(self.device)


def run_layer(
    model: PreTrainedModel, family: SpeechFamily, layer: nn.Module, frames: Frames, done: Callable[[float], None]
) -> None:
    """Replace ``frames.x`` by the layer's output; ``done`` is told by each block how many frames' work that was."""
    mixer, opened = family.mixer(layer), family.open(layer)
    if mixer is None:
        slot_output = _attend(opened, family.block_attention(model, layer), frames, done)
    else:
        slot_output = _sweep(opened, mixer.sweeps(), frames, done)
    if opened.reach:
        _finish_with_halos(opened, slot_output, frames)


def spare_widths(model: PreTrainedModel, family: SpeechFamily) -> list[int]:
    """Widths of the buffers that the layers need beside their input: for each, the widest that any layer asks for."""
    width = family.base(model).config.hidden_size
    frame = torch.zeros(1, 1, width, dtype=model.dtype, device=model.device)
    needs = []
    for layer in family.layers(model):
        mixer = family.mixer(layer)
        attention = [width] * 2  # keys and values
        opened = family.open(layer)
        need = attention if mixer is None else sweep_widths(opened, mixer.sweeps(), frame)[:-1]
        needs.append([*need, width] if opened.reach else need)
    return [max(widths) for widths in zip_longest(*needs, fillvalue=0)]


def _sweep(opened: Opened, sweeps: tuple[Sweep, ...], frames: Frames, done: Callable[[float], None]) -> Tensor:
    """Finishes the layer; where its end has a reach, what is given back is the slot's output, and nothing else done."""
    partial = None
    for number, (sweep, width) in enumerate(zip(sweeps, sweep_widths(opened, sweeps, frames.frame()), strict=True)):
        is_last = number == len(sweeps) - 1 and not opened.reach
        target = frames.x if is_last else frames.spare(number, width)
        state = None
        for block in frames.blocks(reverse=sweep.reverse, whole=sweep.whole):
            x = frames.read(frames.x, block)
            left = None if partial is None else frames.read(partial, block)
            out, state = sweep.step(opened.before(x), left, state)
            target[block] = (opened.after(x, out) if is_last else out)[0]
            done((block.stop - block.start) / len(sweeps))
        partial = target
    return partial


def _finish_with_halos(opened: Opened, slot_output: Tensor, frames: Frames) -> None:
    """The end of a layer, in place, for blocks with the ``reach`` frames that it sees on either side.

    The zeros that its convolution pads with count at the ends of the audio alone. The frames before a block are
    overwritten by then, so the few that it sees are kept.
    """
    before = frames.x[:0]
    for block in frames.blocks():
        own = slice(before.size(0), before.size(0) + block.stop - block.start)
        seen = slice(block.start - own.start, min(block.stop + opened.reach, frames.num_frames))
        x = torch.cat([before, frames.x[block.start : seen.stop]])
        before = torch.cat([before, frames.x[block]])[-opened.reach :]
        finished = opened.after(x[None].to(frames.device), frames.read(slot_output, seen))
        frames.x[block] = finished[0, own]


def sweep_widths(opened: Opened, sweeps: tuple[Sweep, ...], frame: Tensor) -> list[int]:
    """How many values every sweep puts out for a frame: seen on one, (1, 1, D), so that no mixer has to tell."""
    x, partial, widths = opened.before(frame), None, []
    for sweep in sweeps:
        partial, _ = sweep.step(x, partial, None)
        widths.append(partial.size(2))
    return widths


def _attend(opened: Opened, attention: BlockAttention, frames: Frames, done: Callable[[float], None]) -> Tensor:
    """As :func:`_sweep`."""
    keys, values = (frames.spare(number, frames.width) for number in range(2))
    for block in frames.blocks():
        k, v = attention.keys_values(opened.before(frames.read(frames.x, block)), block.start)
        keys[block], values[block] = k[0], v[0]
    target = frames.spare(2, frames.width) if opened.reach else frames.x
    everything = slice(0, frames.num_frames)
    keys, values = frames.read(keys, everything), frames.read(values, everything)
    for block in frames.blocks():
        x = frames.read(frames.x, block)
        out = attention.attend(opened.before(x), keys, values, block.start)
        target[block] = (out if opened.reach else opened.after(x, out))[0]
        done(block.stop - block.start)
    return target


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
