"""Normalised linear attention: positive features of queries and keys, a decay, and the softmax's denominator.

For each head, with the features phi of Hedgehog (Zhang et al., arXiv 2402.04347), step sizes s_t > 0 made from the
frame and a rate of decay r,

    phi(z) = softmax([W z, -W z])                                            one W for queries, one for keys
    y_t    = sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts,   w_ts = phi(q_t) . phi(k_s) exp(-r sum_{s < i <= t} s_i) s_s

Weights are positive and sum to one, as attention's do, and nothing else stands between q, k, v and o: no convolution,
no norm, no gate. A frame's step says how much it counts and how much of the past it lets go, as in Mamba-2. The
denominator is one more column of the values, of ones, which ``ops.ssd`` scans along with them.

``window`` gives the frames next to a query the weights that they had, exp(q_t . k_s / sqrt(d)), under the same
denominator (LoLCATs, Zhang et al., arXiv 2410.10254); the scan then takes the frames beyond alone, and so runs
``window`` + 1 frames late. Of two directions (``Bidirectional`` with shared projections) the second one leaves out
the frame itself, and both have one denominator.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.mixers.attention_heads import AttentionHeads
from cald_speech.mixers.averages import NO_KEYS, joined, packed, unpacked
from cald_speech.mixers.base import AttentionWeights, Projection, projected
from cald_speech.mixers.scan import STEP_OF_ONE, CausalMixer, Scan, Streams
from cald_speech.mixers.windowed_attention import Band, banded_attention_parts
from cald_speech.ops import mask_padding, ssd

LEAST_WEIGHT = 1e-12  # what a denominator is at least; half precision has a floor of its own


class Frames(NamedTuple):
    """What of each frame others see: (B, T, ...) each."""

    values: Tensor  # (B, T, H, P + 1), the last of them a one; a frame that is none has zeros
    key_features: Tensor  # (B, T, H, features)
    steps: Tensor  # (B, T, H), float32
    keys: Tensor  # (B, T, H, P), where there is a window; else (B, T, 0)


class FeatureState(NamedTuple):
    """What one piece of a sequence leaves for the next: the scan's state, and the frames that it does not hold yet."""

    ssd: Tensor  # (B, H, P + 1, features), float32
    waiting: Frames | None


class FeatureScan(Scan):
    """Averages of the values passed, weighed by features that fade, and within ``window`` frames by the softmax.

    Its streams are queries' features (B, T, H, features), the parts of :class:`Frames`, and queries (B, T, H, P) where
    there is a window. What it puts out are sums of values and weights, (B, T, H (P + 1)), and with a window averages
    and totals as :func:`~cald_speech.mixers.averages.packed` makes them.

    Arguments
    ---------
    num_heads : H.
    window : frames next to a query whose weights are the softmax's; 0 for none.
    leaves_out_own : True leaves out each query's own frame, which the scan in the other direction counts.
    A_range : where rates of decay start, log-uniformly; a head's memory is 1 / rate frames.
    chunk_size, backend : handed to :func:`cald_speech.ops.ssd`.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        window: int = 0,
        leaves_out_own: bool = False,
        A_range: tuple[float, float] = (0.001, 0.01),
        chunk_size: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.num_heads, self.window, self.leaves_out_own = num_heads, window, leaves_out_own
        self.options = {"chunk_size": chunk_size, "backend": backend}
        low, high = (math.log(rate) for rate in A_range)
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(low, high))
        # How much the weights beyond the window count beside those within it: exp(q . k / sqrt(d)) is 1 at small q and
        # k only, and larger in the mean.
        self.gain_log = nn.Parameter(torch.ones(num_heads)) if window else None

    @property
    def delay(self) -> int:
        """Frames that enter the state late: those that it must not hold yet."""
        return self.window + 1 if self.window else int(self.leaves_out_own)

    def decay_rates(self) -> Tensor:
        """A = -r < 0, (H,), in float32."""
        return -self.A_log.float().exp()

    def forward(
        self, streams: tuple[Tensor, ...], lengths: Tensor | None, *, state: FeatureState | None, reverse: bool
    ) -> tuple[Tensor, FeatureState]:
        if self.window:  # whose scores are made before they are left out: nothing at padding may be large
            streams = tuple(mask_padding(stream, lengths) for stream in streams)
        query_features, *own = streams[:5]
        own = Frames(*own)
        if self.delay == 0:
            y, held = self._scan(query_features, own, lengths, None if state is None else state.ssd, reverse)
            return y.flatten(2), FeatureState(held, None)
        y, seen, state = self._scan_late(query_features, own, lengths, state, reverse)
        if not self.window:  # the scan of the late frames has not faded in this one
            return (y * (own.steps * self.decay_rates()).exp()[..., None].to(y.dtype)).flatten(2), state
        near = self._within_window(streams[5], seen, reverse)
        y, total = _average(y)
        # Features' products are 1 / (their number) in the mean.
        total = total + self.gain_log.float() + math.log(query_features.size(-1))
        return packed(*joined(*near, y, total), own.values.dtype), state

    def _scan(
        self, query_features: Tensor, frames: Frames, lengths: Tensor | None, state: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        return ssd(
            frames.values,
            frames.steps,
            self.decay_rates(),
            frames.key_features,
            query_features,
            lengths=lengths,
            reverse=reverse,
            initial_state=state,
            return_final_state=True,
            **self.options,
        )

    def _scan_late(
        self, queries: Tensor, own: Frames, lengths: Tensor | None, state: FeatureState | None, reverse: bool
    ) -> tuple[Tensor, Frames, FeatureState]:
        """The scan's output, the frames that the window sees, and the state."""
        delay, num_frames = self.delay, queries.size(1)
        waiting = _no_frames(own, delay) if state is None else state.waiting
        left = _left_waiting(own, waiting, lengths, reverse)
        if state is None:  # the first frames read a state that holds none: nothing has to be moved
            late, read = (slice(delay, None), slice(0, -delay)) if reverse else (slice(0, -delay), slice(delay, None))
            lengths = None if lengths is None else (lengths - delay).clamp(min=0)
            y, held = self._scan(queries[:, read], Frames(*(v[:, late] for v in own)), lengths, None, reverse)
            padding = (0, num_frames - y.size(1)) if reverse else (num_frames - y.size(1), 0)
            return F.pad(y, (0, 0, 0, 0, *padding)), own, FeatureState(held, left)
        seen = _in_time(own, waiting, lengths, reverse)
        late = slice(delay, None) if reverse else slice(0, num_frames)
        y, held = self._scan(queries, Frames(*(v[:, late] for v in seen)), lengths, state.ssd, reverse)
        return y, seen, FeatureState(held, left)

    def _within_window(self, q: Tensor, seen: Frames, reverse: bool) -> tuple[Tensor, Tensor]:
        """Averages (B, T, H, P) and totals (B, T, H) over the frames at most ``window`` away."""
        values, keys = seen.values.transpose(1, 2), seen.keys.transpose(1, 2)
        first = 0 if reverse else keys.size(2) - q.size(1)
        near = (int(self.leaves_out_own), self.window) if reverse else (-self.window, -int(self.leaves_out_own))
        band = Band.over(q.size(1), keys.size(2), *near, first)
        there = band.keys(values[:, :1, :, -1:])[..., 0][:, :, None] > 0  # (B * tiles, 1, 1, width)
        allowed = band.allowed(q.device).repeat(q.size(0), 1, 1)[:, None] & there
        bias = torch.zeros((), device=q.device).where(allowed, NO_KEYS)
        y, total = banded_attention_parts(q.transpose(1, 2), keys, values[..., :-1], band, bias)
        return y.transpose(1, 2), total[..., 0].transpose(1, 2)

    def joined(self, past: Tensor, future: Tensor) -> Tensor:
        """Sums are added; averages are weighed by their totals."""
        if not self.window:
            return past + future
        parts = (unpacked(part, self.num_heads) for part in (past, future))
        (y, total), (other, other_total) = parts
        return packed(*joined(y, total, other, other_total), past.dtype)

    def average_(self, y: Tensor) -> Tensor:
        """Sums to averages in place, (B, T, H (P + 1)): what without gradients takes no memory. Not with a window."""
        sums = y.unflatten(-1, (self.num_heads, -1))
        weight = sums[..., -1:].to(torch.promote_types(y.dtype, torch.float32))
        sums.mul_(weight.clamp(min=_least(y.dtype)).reciprocal().to(y.dtype))
        return y

    def averaged(self, y: Tensor) -> Tensor:
        """What the scan, or two joined, have put out to averages (B, T, H, P)."""
        if self.window:
            return unpacked(y, self.num_heads)[0].to(y.dtype)
        return _average(y.unflatten(-1, (self.num_heads, -1)))[0].to(y.dtype)


class NormalisedLinearAttention(AttentionHeads, CausalMixer):
    """Linear attention whose weights are positive and sum to one, with a decay; exact near the query, if so wanted.

    In both directions, ``Bidirectional(mixer=NormalisedLinearAttention, share_projections=True)`` has one denominator.
    A head has twice its size of features: the Triton kernels take heads up to 64, larger ones run through PyTorch.

    Arguments
    ---------
    d_model, num_heads : of the attention in whose place it stands.
    window : frames on either side whose weights are the softmax's own; 0 for none.
    bias : True gives the four projections a bias, as speech encoders' attention has.
    options : ``A_range`` (where rates of decay start: 1 / rate is a head's memory in frames), and ``chunk_size`` and
        ``backend`` of :func:`cald_speech.ops.ssd`.

    Example
    -------
    >>> mixer = NormalisedLinearAttention(64, num_heads=4)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    def __init__(self, d_model: int, num_heads: int = 1, *, window: int = 0, bias: bool = True, **options):
        super().__init__(d_model, num_heads, bias=bias)
        if window < 0:
            raise ValueError(f"window: expected 0 for none, or frames on either side, got {window}")
        self.scan_options = {"window": window, **options}
        # With W = c I and small queries and keys the weights are 1 + c^2 q . k / d + (what q or k alone decides) + ...,
        # and exp(q . k / sqrt(d)) is 1 + q . k / sqrt(d) + ...
        start = self.head_dim**0.25 * torch.eye(self.head_dim).repeat(num_heads, 1, 1)
        self.query_map, self.key_map = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        self.step_proj = Projection(d_model, num_heads)
        nn.init.constant_(self.step_proj.bias, STEP_OF_ONE)
        self.scan = self.new_scan()

    def new_scan(self) -> FeatureScan:
        return FeatureScan(self.num_heads, **self.scan_options)

    def opposite_scan(self) -> FeatureScan:
        return FeatureScan(self.num_heads, leaves_out_own=True, **self.scan_options)

    def project(self, x: Tensor) -> Streams:
        q, k = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj))
        steps = F.softplus(self.step_proj(x).float())
        seen = (self._values_with_ones(x), _features(k, self.key_map), steps)
        window = (k, q) if self.scan.window else (k[..., :0],)
        return Streams((_features(q, self.query_map), *seen, *window), None)

    def _values_with_ones(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, H, P + 1) in one product: a copy of all values would cost as much as their scan."""
        heads = (self.num_heads, self.head_dim)
        if not isinstance(self.v_proj, Projection):  # an adapter's, which does more than multiply by its weight
            return F.pad(self.v_proj(x).unflatten(-1, heads), (0, 1), value=1.0)
        weight = F.pad(self.v_proj.weight.unflatten(0, heads), (0, 0, 0, 1)).flatten(0, 1)
        bias = weight.new_zeros(heads) if self.v_proj.bias is None else self.v_proj.bias.unflatten(0, heads)
        bias = F.pad(bias, (0, 1), value=1.0).flatten()
        return projected(x, weight, bias).unflatten(-1, (self.num_heads, -1))

    def finish(self, y: Tensor, gate: None) -> Tensor:
        if self.scan.window or torch.is_grad_enabled() or not isinstance(self.out_proj, Projection):
            return self.out_proj(self.scan.averaged(y).flatten(2))
        # In place, and with the ones, which nothing is made of: new memory costs as much as a third of the scan.
        heads = (self.num_heads, self.head_dim)
        weight = F.pad(self.out_proj.weight.unflatten(1, heads), (0, 1)).flatten(1)
        return projected(self.scan.average_(y), weight, self.out_proj.bias)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """q, k, v and o, with their biases; the features resemble exp(q . k / sqrt(d)), and every frame's step is 1."""
        named = super().init_from_attention(weights)
        self.step_proj.weight.zero_()
        return named


def _features(x: Tensor, weight: Tensor) -> Tensor:
    """(B, T, H, d) to (B, T, H, 2 d), positive, which sum to one."""
    z = torch.einsum("bthd,hfd->bthf", x, weight)
    return torch.cat([z, -z], dim=-1).softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32)).to(z.dtype)


def _average(y: Tensor) -> tuple[Tensor, Tensor]:
    """From sums of values and of weights (B, T, H, P + 1) to averages, and the logarithms of the weights' sums."""
    floor = _least(y.dtype)
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    weight = y[..., -1]
    safe = weight.clamp(min=floor)
    return y[..., :-1] / safe[..., None], safe.log().where(weight > 0, NO_KEYS)


def _least(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).tiny, LEAST_WEIGHT)


def _no_frames(like: Frames, count: int) -> Frames:
    """So many that count nowhere."""
    return Frames(*(v.new_zeros(v.size(0), count, *v.shape[2:]) for v in like))._replace(
        steps=like.steps.new_ones(like.steps.size(0), count, like.steps.size(2))
    )


def _in_time(own: Frames, waiting: Frames, lengths: Tensor | None, reverse: bool) -> Frames:
    """Those that waited before this piece's or, in reverse, behind each sequence's last valid frame."""
    both = Frames(*(torch.cat(pair[::-1] if reverse else pair, dim=1) for pair in zip(waiting, own, strict=True)))
    if lengths is None or not reverse:
        return both
    size, num_frames = both.steps.size(1), own.steps.size(1)
    rows = torch.arange(lengths.size(0), device=lengths.device)[:, None]
    place = torch.arange(size, device=lengths.device)
    place = torch.where(place < lengths[:, None], place, place + num_frames - lengths[:, None]).clamp(max=size - 1)
    return Frames(*(v[rows, place] for v in both))


def _left_waiting(own: Frames, waiting: Frames, lengths: Tensor | None, reverse: bool) -> Frames:
    """The last frames of these, in the order of the scan, as many as waited before."""
    num_frames, delay, device = own.steps.size(1), waiting.steps.size(1), own.steps.device
    if reverse:
        lengths = None if lengths is None else lengths.clamp(max=delay)
        seen = _in_time(Frames(*(v[:, :delay] for v in own)), waiting, lengths, reverse)
        return Frames(*(v[:, :delay] for v in seen))
    if lengths is None:
        seen = _in_time(Frames(*(v[:, max(0, num_frames - delay) :] for v in own)), waiting, None, reverse)
        return Frames(*(v[:, -delay:] for v in seen))
    rows = torch.arange(lengths.size(0), device=device)[:, None]
    place = lengths[:, None] - delay + torch.arange(delay, device=device)
    here, before = place.clamp(min=0), (place + delay).clamp(max=delay - 1)
    pairs = ((mine[rows, here], theirs[rows, before]) for mine, theirs in zip(own, waiting, strict=True))
    return Frames(*(a.where(place.ge(0).view(*place.shape, *(1,) * (a.dim() - 2)), b) for a, b in pairs))
