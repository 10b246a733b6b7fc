"""Hydra: a quasiseparable matrix over the frames, past and future and a diagonal of its own, from one projection.

Hwang et al., "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers" (arXiv 2407.09941). For each
head, with the decays a = exp(dt A) of either direction,

    y_i = sum_{j<i} (prod_{j<k<=i} a_k^past) dt_j^past (C_i . B_j) x_j
        + sum_{j>i} (prod_{i<=k<j} a_k^future) dt_j^future (C_i . B_j) x_j
        + (delta_i + D) x_i

The authors' code differs. It has B and C for each direction; here both directions share them, so that they are read
once and start as q and k. A and the bias of dt are common to its directions; here each has its own. It makes delta of
x; here the projection of the mixer's input does. It shifts each scan by a frame, and so reads the past by C of the
frame before; here frame i reads by its own C, and what the scans count of frame i itself is taken out again. And it has
a convolution over frames on both sides; here there is none: a block of long audio would lack the frames after it, and
a start from attention needs none.
"""

from typing import Any

import torch
from torch import Tensor

from cald_speech.mixers.base import AttentionWeights, Sweep
from cald_speech.mixers.mamba2 import GatedMixer, SSDScan
from cald_speech.ops import mask_padding, ssd_bidirectional


class Hydra(GatedMixer):
    """The quasiseparable mixer.

    Arguments
    ---------
    d_model : width D of the layer.
    num_heads : heads of the attention in whose place it stands.
    options : ``head_dim``, ``d_state``, ``n_groups``, ``expand`` and ``bias`` of
        :class:`~cald_speech.mixers.mamba2.GatedMixer`; ``dt_range``, ``A_range``, ``chunk_size`` and ``backend`` of
        :class:`~cald_speech.mixers.mamba2.SSDScan`.

    Example
    -------
    >>> mixer = Hydra(64, num_heads=4)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    values_per_head = 3  # step sizes of past and future, and delta
    norm_first = True

    def __init__(self, d_model: int, num_heads: int = 1, **options):
        super().__init__(d_model, num_heads, d_conv=0, activation="identity", **options)
        self.backward_scan = SSDScan(self.heads, skip=False, **self.scan_options)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """As :class:`~cald_speech.mixers.mamba2.GatedMixer` does, in both directions."""
        self.backward_scan.pass_through()
        return super().init_from_attention(weights)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        (xBC, per_head), gate = self.project(x)
        past, future, delta = per_head.chunk(3, dim=-1)
        x, B, C = self.scan.split(xBC)
        y = ssd_bidirectional(
            x,
            torch.stack([self.scan.step_sizes(past), self.backward_scan.step_sizes(future)], dim=2),
            torch.stack([self.scan.decay_rates(), self.backward_scan.decay_rates()]),
            B,
            C,
            self.scan.D,
            lengths=lengths,
            **self.scan.options,
        )
        y = y.flatten(-2) + self.own_frames(xBC, past, future, delta)
        return mask_padding(self.finish(y, gate), lengths)

    def own_frames(self, xBC: Tensor, past: Tensor, future: Tensor, delta: Tensor) -> Tensor:
        """delta x, less what both scans count of a frame for itself, dt (C . B) x: (B, T, H * P)."""
        x, B, C = self.scan.split(xBC)
        dtype = torch.promote_types(x.dtype, torch.float32)
        steps = self.scan.step_sizes(past) + self.backward_scan.step_sizes(future)
        products = (B.to(dtype) * C.to(dtype)).sum(-1).repeat_interleave(self.heads.count // self.heads.groups, dim=-1)
        return (x * (delta.to(dtype) - steps * products)[..., None]).to(x.dtype).flatten(-2)

    def sweeps(self) -> tuple[Sweep, ...]:
        """The past and then the future, which adds the diagonal and finishes; each sweep projects anew."""
        return Sweep(self._scan_past), Sweep(self._finish_with_future, reverse=True)

    def _scan_past(self, x: Tensor, partial: None, state: Any) -> tuple[Tensor, Any]:
        (xBC, per_head), _ = self.project(x)
        return self.scan((xBC, per_head.chunk(3, dim=-1)[0]), None, state=state, reverse=False)

    def _finish_with_future(self, x: Tensor, partial: Tensor, state: Any) -> tuple[Tensor, Any]:
        (xBC, per_head), gate = self.project(x)
        past, future, delta = per_head.chunk(3, dim=-1)
        y, state = self.backward_scan((xBC, future), None, state=state, reverse=True)
        return self.finish(y + partial + self.own_frames(xBC, past, future, delta), gate), state
