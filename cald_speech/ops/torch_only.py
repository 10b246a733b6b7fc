"""The ops by their torch backends alone, as a model folder's own file has them: no table, no C and no Triton.

Where a graph is traced, by torch.compile too, they are the steps that ``torch.export`` sees: of any length.

They take what the ops of :mod:`cald_speech.ops` take. What a caller may have got wrong is not looked at here, and
``backend`` is not either: it changes speed, not the result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cald_speech.ops.backends import without_autocast
from cald_speech.ops.gated_delta.torch_chunked import gated_delta_torch
from cald_speech.ops.gated_delta.torch_traced import gated_delta_traced
from cald_speech.ops.lengths import check_lengths, mask_padding, valid_frames
from cald_speech.ops.selective_scan.torch_blocked import selective_scan_torch
from cald_speech.ops.selective_scan.torch_traced import selective_scan_traced
from cald_speech.ops.short_conv.torch_blocked import short_conv_torch
from cald_speech.ops.short_conv.torch_traced import short_conv_traced
from cald_speech.ops.ssd.torch_chunked import ssd_bidirectional_torch, ssd_pair_torch, ssd_torch
from cald_speech.ops.ssd.torch_traced import ssd_bidirectional_traced, ssd_pair_traced, ssd_traced


def by_torch(function: Callable, traced: Callable, count: int, **defaults: Any) -> Callable:
    """An op by the function of its torch backend, which takes every argument.

    Arguments
    ---------
    function : it takes the op's tensors by position.
    traced : the same, for graphs.
    count : of those; None stands for a last one that is left out.
    defaults : of the op's options.

    Example
    -------
    >>> ones = torch.ones(1, 2, 1)
    >>> short_conv(ones, torch.ones(1, 1), activation="identity").flatten().tolist()
    [1.0, 1.0]
    """

    def op(*tensors: Any, backend: str = "auto", **options: Any) -> Any:
        options = defaults | options
        device = (tensors[0] if isinstance(tensors[0], Tensor) else tensors[0][0]).device
        if options["lengths"] is not None:
            # A copy on a CPU too: whoever writes to the caller's before the backward pass would change that.
            options["lengths"] = options["lengths"].to(device, copy=device.type == "cpu")
        with without_autocast(device):
            chosen = traced if torch.compiler.is_compiling() else function
            return chosen(*tensors, *(None,) * (count - len(tensors)), **options)

    return op


_STATES = {"reverse": False, "initial_state": None, "return_final_state": False}

ssd = by_torch(ssd_torch, ssd_traced, 6, lengths=None, chunk_size=None, **_STATES)
ssd_bidirectional = by_torch(ssd_bidirectional_torch, ssd_bidirectional_traced, 6, lengths=None, chunk_size=None)
ssd_pair = by_torch(ssd_pair_torch, ssd_pair_traced, 6, lengths=None, chunk_size=None)
short_conv = by_torch(short_conv_torch, short_conv_traced, 3, lengths=None, activation="silu", **_STATES)
selective_scan = by_torch(selective_scan_torch, selective_scan_traced, 6, lengths=None, chunk_size=None, **_STATES)
gated_delta = by_torch(gated_delta_torch, gated_delta_traced, 5, lengths=None, chunk_size=None, **_STATES)

__all__ = [
    "check_lengths",
    "gated_delta",
    "mask_padding",
    "selective_scan",
    "short_conv",
    "ssd",
    "ssd_bidirectional",
    "ssd_pair",
    "valid_frames",
]
