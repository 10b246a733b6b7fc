"""Functions on tensors: the scans and convolutions under every mixer, each beside a naive reference (floor F0).

An op is a folder: ``__init__`` has its signature, its documentation, its check and the table of its backends; then
come ``naive.py``, which defines it, ``torch_*.py``, ``native/`` (C for CPUs, beside the Python that calls it) and
``triton/`` (kernels for GPUs). Ops share ``backends.py`` (who runs, and why not), ``arguments.py`` (what is refused),
``lengths.py``, ``bad_frames.py`` and, for C, ``native/`` (compiler, call, headers). Tracers are shown ``operators.py``,
and ``torch.export`` the ``torch_traced.py`` of every op (``traced.py``).
"""

from cald_speech.ops.gated_delta import BACKENDS as GATED_DELTA_BACKENDS
from cald_speech.ops.gated_delta import gated_delta
from cald_speech.ops.lengths import check_lengths, mask_padding, valid_frames
from cald_speech.ops.selective_scan import BACKENDS as SELECTIVE_SCAN_BACKENDS
from cald_speech.ops.selective_scan import selective_scan
from cald_speech.ops.short_conv import BACKENDS as SHORT_CONV_BACKENDS
from cald_speech.ops.short_conv import short_conv
from cald_speech.ops.ssd import BACKENDS as SSD_BACKENDS
from cald_speech.ops.ssd import ssd, ssd_bidirectional, ssd_pair

# The table of backends of every op, by the op's name.
OPS = {
    "ssd": SSD_BACKENDS,
    "ssd_bidirectional": SSD_BACKENDS,
    "ssd_pair": SSD_BACKENDS,
    "short_conv": SHORT_CONV_BACKENDS,
    "selective_scan": SELECTIVE_SCAN_BACKENDS,
    "gated_delta": GATED_DELTA_BACKENDS,
}

__all__ = [
    "OPS",
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
