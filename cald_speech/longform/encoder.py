"""A speech encoder over audio of any length, with the output of its whole-utterance forward pass.

The model's pieces are run so that memory holds two or three (frames x width) buffers and one block's work:

1. a first pass over the audio, for what must be known of all of it (:func:`~cald_speech.longform.front_end.measure`);
2. convolutions and positional convolution in pieces with exact halos (:mod:`~cald_speech.longform.front_end`);
3. layer by layer, each mixer's scans carrying their state from block to block, left to right and right to left, norms
   and feed-forward in the same blocks (:mod:`~cald_speech.longform.layers`).

No step is an approximation. Time grows with the length, and with its square only in layers that kept attention.
Memory can be worked out before it is taken (:func:`predicted_peak_bytes`):

    peak = weights + T (D + W) b + work        T = 50 frames for each second

b bytes for a number (4 in float32, 2 in the 16-bit types), D the model's width, W what its layers need beside their
input for each frame: D or the mixer's inner width for a bidirectional mixer, nothing for a causal one, 2 D (keys and
values) where attention was kept. The work is one block's, some tens of MiB, however long the audio is. With ``storage``
the middle term is on disk; the pages of it that stand in memory can be had back by other programs at any time.

Python, torch and transformers take some 0.7 GiB of resident memory before that. One hour in wav2vec2-base size, every
layer with ``Bidirectional``, makes 0.51 + 1.03 + 0.06 GiB in float32.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cald_speech.conversion.int8 import INT8, count_parameters, in_int8, is_int8
from cald_speech.families import FrontEnd, SpeechFamily, family_of
from cald_speech.longform.front_end import add_positions, fill, measure
from cald_speech.longform.layers import Buffers, Frames, run_layer, spare_widths
from cald_speech.longform.source import SAMPLE_RATE, AudioSource

DTYPES = (torch.float32, torch.bfloat16, torch.float16, INT8)
# The convolutional front end costs as much as this many layers; for the progress alone.
FRONT_END_IN_LAYERS = 4


class BlockSizes(NamedTuple):
    """Frames handled at once. On a CPU a block's work stays near its caches; a GPU wants enough of it."""

    convolutions: int
    positions: int
    layers: int

    @classmethod
    def of(cls, device: torch.device, front: FrontEnd, chunk_s: float) -> "BlockSizes":
        chunk = max(1, int(chunk_s * SAMPLE_RATE) // front.stride)
        return cls(min(chunk, 50), 2048, 512) if device.type == "cpu" else cls(chunk, 8192, 8192)


def encode_long(
    model: PreTrainedModel,
    source: AudioSource,
    *,
    chunk_s: float = 10.0,
    dtype: torch.dtype = torch.float32,
    storage: str | Path | None = None,
    do_normalize: bool = True,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """The encoder's output for all of the audio, after the last layer and the final norm.

    Arguments
    ---------
    model : a converted or unconverted model of any family, in evaluation mode, on any device.
    source : the audio.
    chunk_s : seconds of audio that the convolutions take at once, at most (a CPU takes 1 s, which suits its caches). It
        changes memory and speed, not the result.
    dtype : float32, bfloat16 or float16, of weights and buffers; int8, on a CPU: of the layers' linear maps, with
        buffers in float32. Where the model's is another, a copy of it is made.
    storage : a folder for the buffers, as files mapped into memory; None keeps them in memory on the model's device.
        The files have no names and are gone when the result is, or the program.
    do_normalize : as in the model's feature extractor: True brings the audio to mean 0 and variance 1.
    progress : called after every block of every stage with the fraction done, from 0 to 1. What it raises ends the
        work.

    Returns
    -------
    (T, D) in the buffers' dtype, on the model's device, or with ``storage`` in a mapped file. T counts the layers'
    frames, in SEW half of those that come out; it is 0 for audio shorter than one (25 ms). Where the source meets a
    fault, these are the frames up to it.

    Raises
    ------
    UserError
        for a folder that cannot be written or a disk with too little room, naming what is needed.
    ValueError
        for an argument that does not fit, and for a model in training mode.

    Example
    -------
    >>> from transformers import HubertConfig
    >>> from cald_speech import LayerMap, convert
    >>> from cald_speech.families import families
    >>> from cald_speech.mixers import Bidirectional
    >>> family = families()["hubert"]
    >>> model = family.load(HubertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    >>> _ = convert(model, LayerMap(Bidirectional))
    >>> encode_long(model.eval(), AudioSource.from_samples(torch.randn(32_000))).shape
    torch.Size([99, 32])
    """
    model, family, frames, _ = _encode(model, source, chunk_s, dtype, storage, do_normalize, progress)
    norm = family.final_norm(model)
    with torch.inference_mode():
        for block in frames.blocks():
            frames.x[block] = norm(frames.read(frames.x, block))[0]
    return frames.x


def stream_logits(
    model: PreTrainedModel,
    source: AudioSource,
    *,
    chunk_s: float = 10.0,
    dtype: torch.dtype = torch.float32,
    storage: str | Path | None = None,
    do_normalize: bool = True,
    progress: Callable[[float], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The head's output over :func:`encode_long`: parts in order, each (first frame, logits (t, V) float32 on the CPU).

    Same arguments and errors, and UserError for a model without a head. All layers run in the call itself; the parts
    then come without delay. The buffers live until the last part, or until the iterator is dropped.

    Example
    -------
    >>> from transformers import HubertConfig
    >>> from cald_speech.families import families
    >>> config = HubertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = families()["hubert"].load(config).eval()
    >>> source = AudioSource.from_samples(torch.randn(320_000))
    >>> [(first, tuple(logits.shape)) for first, logits in stream_logits(model, source)]
    [(0, (512, 32)), (512, (487, 32))]
    """
    family_of(model).head(model)  # before the work: a model without a head ends here
    return _logits(*_encode(model, source, chunk_s, dtype, storage, do_normalize, progress), progress)


def predicted_peak_bytes(
    model: PreTrainedModel,
    duration_s: float,
    *,
    chunk_s: float = 10.0,
    dtype: torch.dtype = torch.float32,
    storage: object = None,
) -> int:
    """Bytes on the model's device for so many seconds of audio: weights in ``dtype``, buffers and work.

    Same arguments as :func:`encode_long`. Where ``dtype`` is not the model's, the model itself stays in memory beside
    the copy; it is not counted.

    Example
    -------
    >>> from transformers import HubertConfig
    >>> from cald_speech.families import families
    >>> model = families()["hubert"].load(HubertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    >>> hour, day = (predicted_peak_bytes(model, s) for s in (3600, 24 * 3600))
    >>> (day - hour) / (23 * 3600 * 50 * (32 + 2 * 32) * 4)
    1.0
    """
    family = family_of(model, SpeechFamily)
    front, config, size = family.front_end(model), family.base(model).config, torch.finfo(_of_buffers(dtype)).bits // 8
    weights = count_parameters(model) * size
    spare = sum(spare_widths(model, family))
    num_frames, columns = front.num_frames(int(duration_s * SAMPLE_RATE)), config.hidden_size + spare
    buffers = (
        0 if storage is not None else (num_frames * config.hidden_size + num_frames // front.squeeze * spare) * size
    )
    sizes = BlockSizes.of(model.device, front, chunk_s)
    return weights + buffers + _work(front, config, sizes, columns) * size


def _logits(
    model: PreTrainedModel,
    family: SpeechFamily,
    frames: Frames,
    num_frames: int,
    progress: Callable[[float], None] | None,
) -> Iterator[tuple[int, Tensor]]:
    head, norm, squeeze = family.head(model), family.final_norm(model), family.front_end(model).squeeze
    for block in frames.blocks():
        with torch.no_grad():
            logits = head(norm(frames.read(frames.x, block)))[0]
        yield block.start * squeeze, logits.float().cpu()
        if progress is not None:
            progress(1.0)
    start = frames.num_frames * squeeze
    if num_frames > start:
        with torch.no_grad():
            yield start, family.rest(model, num_frames - start).float().cpu()


def _encode(
    model: PreTrainedModel,
    source: AudioSource,
    chunk_s: float,
    dtype: torch.dtype,
    storage: str | Path | None,
    do_normalize: bool,
    progress: Callable[[float], None] | None,
) -> tuple[PreTrainedModel, SpeechFamily, Frames, int]:
    """The model in ``dtype``, its family, the last layer's output before the final norm, the number of frames that come
    out."""
    if chunk_s <= 0:
        raise ValueError(f"chunk_s: expected seconds of audio, more than 0, got {chunk_s}")
    model = in_dtype(model, dtype)
    family = family_of(model, SpeechFamily)
    family.context(model).forget()
    front, layers = family.front_end(model), family.layers(model)
    statistics = measure(source, front, normalise=do_normalize, progress=progress)
    num_frames, width = front.num_frames(statistics.num_samples), family.base(model).config.hidden_size
    sizes = BlockSizes.of(model.device, front, chunk_s)
    done = Progress(progress, num_frames * FRONT_END_IN_LAYERS + num_frames // front.squeeze * len(layers))
    buffers = Buffers(_of_buffers(dtype), model.device, storage)
    with torch.inference_mode():
        spare = spare_widths(model, family)
        buffers.reserve(num_frames, width + -(-sum(spare) // front.squeeze))
        frames = Frames(num_frames, width, spare, sizes.layers, buffers, model.device, front.squeeze)
        fill(frames, front, source, statistics, sizes.convolutions, lambda n: done(FRONT_END_IN_LAYERS * n))
        add_positions(frames, front, sizes.positions, done)
        for layer in layers:
            run_layer(model, family, layer, frames, done)
    return model, family, frames, num_frames


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model, or a copy where its weights have another dtype. Raises ValueError for one in training mode."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if model.training:
        raise ValueError("model: expected one in evaluation mode, got one in training mode. Call model.eval()")
    if dtype == INT8:
        return model if is_int8(model) else in_int8(copy.deepcopy(model).to(torch.float32))
    return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)


def _of_buffers(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == INT8 else dtype


class Progress:
    """Tells ``callback`` (None for nobody) the fraction of ``total`` that was done; call it with what is done next."""

    def __init__(self, callback: Callable[[float], None] | None, total: float):
        self.callback, self.total, self.done = callback, total, 0.0

    def __call__(self, amount: float) -> None:
        self.done += amount
        if self.callback is not None:
            self.callback(min(1.0, self.done / self.total))


def _work(front: FrontEnd, config, sizes: BlockSizes, columns: int) -> int:
    """Numbers that the greediest of the three stages holds at once, beside the buffers."""
    # The first convolution's output is the longest by far: before and behind its activation, and copied once.
    convolutions = 3 * sizes.convolutions * front.widest
    # A piece with its halos: itself, its padding, the convolution's output and the sum; the kernel is made for each
    # from its factors (weight norm), and reordered by the library.
    kernel = sum(p.numel() for p in front.positions.parameters())
    positions = 4 * (sizes.positions + 2 * front.positions_reach) * config.hidden_size + 2 * kernel
    layers = sizes.layers * (2 * config.intermediate_size + 4 * columns)
    return max(convolutions, positions, layers)
