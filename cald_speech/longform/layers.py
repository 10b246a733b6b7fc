"""One layer over all frames, in place: a mixer sweeps through them in blocks, attention takes its queries in blocks."""

from collections.abc import Callable, Iterator
from itertools import zip_longest

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cald_speech.families import BlockAttention, Family, Opened
from cald_speech.longform.buffers import Buffers
from cald_speech.mixers import Sweep


class Frames:
    """Buffers as long as the audio, read and written a block at a time: the layers' input, and spare ones beside it.

    ``spare_widths`` are the columns of each spare buffer; ``block`` is the number of frames the layers take at once;
    ``device`` is the model's.
    """

    def __init__(
        self,
        num_frames: int,
        width: int,
        spare_widths: list[int],
        block: int,
        buffers: Buffers,
        device: torch.device,
    ):
        self.num_frames, self.width, self.block, self.device = num_frames, width, block, device
        self.x = buffers.new(num_frames, width)
        self._spare = [buffers.new(num_frames, columns) for columns in spare_widths]

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
    model: PreTrainedModel, family: Family, layer: nn.Module, frames: Frames, done: Callable[[float], None]
) -> None:
    """Replace ``frames.x`` by the layer's output; ``done`` is told by each block how many frames' work that was."""
    mixer = family.mixer(layer)
    if mixer is None:
        _attend(family.open(layer), family.block_attention(model, layer), frames, done)
    else:
        _sweep(family.open(layer), mixer.sweeps(), frames, done)


def spare_widths(model: PreTrainedModel, family: Family) -> list[int]:
    """Widths of the buffers that the layers need beside their input: for each, the widest that any layer asks for."""
    frame = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    needs = []
    for layer in family.layers(model):
        mixer = family.mixer(layer)
        attention = [model.config.hidden_size] * 2  # keys and values
        needs.append(attention if mixer is None else sweep_widths(family.open(layer), mixer.sweeps(), frame)[:-1])
    return [max(widths) for widths in zip_longest(*needs, fillvalue=0)]


def _sweep(opened: Opened, sweeps: tuple[Sweep, ...], frames: Frames, done: Callable[[float], None]) -> None:
    partial = None
    for number, (sweep, width) in enumerate(zip(sweeps, sweep_widths(opened, sweeps, frames.frame()), strict=True)):
        is_last = number == len(sweeps) - 1
        target = frames.x if is_last else frames.spare(number, width)
        state = None
        for block in frames.blocks(reverse=sweep.reverse, whole=sweep.whole):
            x = frames.read(frames.x, block)
            left = None if partial is None else frames.read(partial, block)
            out, state = sweep.step(opened.before(x), left, state)
            target[block] = (opened.after(x, out) if is_last else out)[0]
            done((block.stop - block.start) / len(sweeps))
        partial = target


def sweep_widths(opened: Opened, sweeps: tuple[Sweep, ...], frame: Tensor) -> list[int]:
    """How many values every sweep puts out for a frame: seen on one, (1, 1, D), so that no mixer has to tell."""
    x, partial, widths = opened.before(frame), None, []
    for sweep in sweeps:
        partial, _ = sweep.step(x, partial, None)
        widths.append(partial.size(2))
    return widths


def _attend(opened: Opened, attention: BlockAttention, frames: Frames, done: Callable[[float], None]) -> None:
    keys, values = (frames.spare(number, frames.width) for number in range(2))
    for block in frames.blocks():
        k, v = attention.keys_values(opened.before(frames.read(frames.x, block)))
        keys[block], values[block] = k[0], v[0]
    everything = slice(0, frames.num_frames)
    keys, values = frames.read(keys, everything), frames.read(values, everything)
    for block in frames.blocks():
        x = frames.read(frames.x, block)
        out = attention.attend(opened.before(x), keys, values, block.start)
        frames.x[block] = opened.after(x, out)[0]
        done(block.stop - block.start)
