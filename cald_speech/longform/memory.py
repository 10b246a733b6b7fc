"""How much memory :func:`~cald_speech.longform.encoder.encode_long` takes, worked out before it is taken.

    peak = weights + T (D + W) b + work        T = 50 frames for each second

b bytes for a number (4 in float32, 2 in the 16-bit types), D the model's width, W what its layers need beside their
input for each frame: D or the mixer's inner width for a bidirectional mixer, nothing for a causal one, 2 D (keys and
values) where attention was kept. The work is one block's, some tens of MiB, however long the audio is. With ``storage``
the middle term is on disk; the pages of it that stand in memory can be had back by other programs at any time.

Python, torch and transformers take some 0.7 GiB of resident memory before that. One hour in wav2vec2-base size, every
layer with ``Bidirectional``, makes 0.51 + 1.03 + 0.06 GiB in float32.
"""

import torch
from transformers import PreTrainedModel

from cald_speech.families import FrontEnd, SpeechFamily, family_of
from cald_speech.longform.encoder import BlockSizes
from cald_speech.longform.layers import spare_widths
from cald_speech.longform.source import SAMPLE_RATE


def predicted_peak_bytes(
    model: PreTrainedModel,
    duration_s: float,
    *,
    chunk_s: float = 10.0,
    dtype: torch.dtype = torch.float32,
    storage: object = None,
) -> int:
    """Bytes on the model's device for so many seconds of audio: weights in ``dtype``, buffers and work.

    Same arguments as ``encode_long``. Where ``dtype`` is not the model's, the model itself stays in memory beside the
    copy; it is not counted.

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
    front, config, size = family.front_end(model), model.config, torch.finfo(dtype).bits // 8
    weights = sum(p.numel() for p in model.parameters()) * size
    columns = config.hidden_size + sum(spare_widths(model, family))
    buffers = 0 if storage is not None else front.num_frames(int(duration_s * SAMPLE_RATE)) * columns * size
    sizes = BlockSizes.of(model.device, front, chunk_s)
    return weights + buffers + _work(front, config, sizes, columns) * size


def _work(front: FrontEnd, config, sizes: BlockSizes, columns: int) -> int:
    """Numbers that the greediest of the three stages holds at once, beside the buffers."""
    # The first convolution's output is the longest by far: before and behind its activation, and copied once.
    convolutions = 3 * sizes.convolutions * front.stride // front.strides[0] * config.conv_dim[0]
    # A piece with its halos: itself, its padding, the convolution's output and the sum; the kernel is made for each
    # from its factors (weight norm), and reordered by the library.
    kernel = config.hidden_size**2 // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    positions = 4 * (sizes.positions + 2 * front.positions_reach) * config.hidden_size + 2 * kernel
    layers = sizes.layers * (2 * config.intermediate_size + 4 * columns)
    return max(convolutions, positions, layers)
