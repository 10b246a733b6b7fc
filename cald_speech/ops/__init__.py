"""Functions on tensors: the scans and convolutions under every mixer, each beside a naive reference (floor F0)."""

from cald_speech.ops.lengths import check_lengths, mask_padding, valid_frames
from cald_speech.ops.selective_scan import selective_scan
from cald_speech.ops.short_conv import short_conv
from cald_speech.ops.ssd import ssd
from cald_speech.ops.ssd.bidirectional import ssd_bidirectional
from cald_speech.ops.ssd.pair import ssd_pair

__all__ = [
    "check_lengths",
    "mask_padding",
    "selective_scan",
    "short_conv",
    "ssd",
    "ssd_bidirectional",
    "ssd_pair",
    "valid_frames",
]
