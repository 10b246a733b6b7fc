"""Two scans, one in each direction, summed: what turns a causal mixer into one for an encoder.

With separate projections and Mamba-2 this is the BiMamba2 of CALD (arXiv 2410.06846), about 20 % larger than the
attention it replaces in Wav2Vec2-large, and both scans run at once; with shared projections both directions read one
projection of the input.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cald_speech.mixers.base import AttentionWeights, Mixer, Sweep
from cald_speech.mixers.mamba2 import Mamba2
from cald_speech.mixers.scan import CausalMixer, in_pieces
from cald_speech.ops import mask_padding


class Bidirectional(Mixer):
    """A causal mixer forwards plus one backwards; reversal stays within each sequence's valid frames.

    Arguments
    ---------
    d_model, num_heads : handed to ``mixer``.
    mixer : factory of the causal mixer, Mamba-2 by default.
    share_projections : True projects once and scans twice, each direction with its own convolution, decay and step
        sizes; the two scans' outputs are summed before the norm. False builds two whole mixers and sums their outputs.
    options : everything else goes to ``mixer``.

    Example
    -------
    >>> mixer = Bidirectional(64, 4, share_projections=True)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 1,
        *,
        mixer: Callable[..., CausalMixer] = Mamba2,
        share_projections: bool = False,
        **options,
    ):
        super().__init__()
        self.share_projections = share_projections
        self.forwards = mixer(d_model, num_heads, **options)
        if share_projections:
            self.backward_scan = self.forwards.opposite_scan()
        else:
            self.backwards = mixer(d_model, num_heads, **options)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if self.share_projections:
            streams = self.forwards.project(x)
            y = self.forwards.scan.with_reverse(self.backward_scan, streams.scanned, lengths)
            return mask_padding(self.forwards.finish(y, streams.gate), lengths)
        if in_pieces(x):
            past = self.forwards(x, lengths)
            return self.backwards.infer(x, lengths, reverse=True, add_to=past)[0]
        streams, others = self.forwards.project(x), self.backwards.project(x)
        scan = self.forwards.scan
        past, future = scan.beside(self.backwards.scan, streams.scanned, others.scanned, lengths)
        out = self.forwards.finish(past, streams.gate) + self.backwards.finish(future, others.gate)
        return mask_padding(out, lengths)

    def sweeps(self) -> tuple[Sweep, ...]:
        """Forwards and then backwards, which adds to what the first sweep put out.

        With shared projections that is the scan's output, for the norm and the gate come after the sum; the second
        sweep projects again, since keeping the streams would take several times the memory of the sequence.
        """
        if self.share_projections:
            return Sweep(self._scan_past), Sweep(self._finish_with_future, reverse=True)
        return *self.forwards.sweeps(), Sweep(self._add_future, reverse=True)

    def _add_future(self, x: Tensor, partial: Tensor, state: Any) -> tuple[Tensor, Any]:
        future, state = self.backwards(x, state=state, return_state=True, reverse=True)
        return future + partial, state

    def _scan_past(self, x: Tensor, partial: None, state: Any) -> tuple[Tensor, Any]:
        return self.forwards.scan(self.forwards.project(x).scanned, None, state=state, reverse=False)

    def _finish_with_future(self, x: Tensor, partial: Tensor, state: Any) -> tuple[Tensor, Any]:
        streams = self.forwards.project(x)
        future, state = self.backward_scan(streams.scanned, None, state=state, reverse=True)
        return self.forwards.finish(self.forwards.scan.joined(partial, future), streams.gate), state

    def output_projections(self) -> tuple[nn.Linear, ...]:
        parts = (self.forwards,) if self.share_projections else (self.forwards, self.backwards)
        return tuple(projection for part in parts for projection in part.output_projections())

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """Both directions start from the attention; outputs that are summed start at half their size."""
        if self.share_projections:
            named = self.forwards.init_from_attention(weights)
            self.backward_scan.start_beside(self.forwards.scan)
            return frozenset(f"forwards.{name}" for name in named)
        weights = weights.with_output_scaled(0.5)
        parts = {"forwards": self.forwards, "backwards": self.backwards}
        return frozenset(
            f"{prefix}.{name}" for prefix, part in parts.items() for name in part.init_from_attention(weights)
        )
