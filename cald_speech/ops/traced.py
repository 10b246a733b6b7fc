"""By op, what ``torch.export`` sees of it: steps of torch alone, for a batch and a length of any size.

An exported program, and what is made of it, so needs nothing of this package. The results are those of the other
backends, but that a frame which is NaN or infinite may spoil frames before it.
"""

from cald_speech.ops.gated_delta.torch_traced import gated_delta_traced
from cald_speech.ops.selective_scan.torch_traced import selective_scan_traced
from cald_speech.ops.short_conv.torch_traced import short_conv_traced
from cald_speech.ops.ssd.torch_traced import ssd_bidirectional_traced, ssd_pair_traced, ssd_traced

TRACED = {
    "ssd": ssd_traced,
    "ssd_bidirectional": ssd_bidirectional_traced,
    "ssd_pair": ssd_pair_traced,
    "selective_scan": selective_scan_traced,
    "gated_delta": gated_delta_traced,
    "short_conv": short_conv_traced,
}
