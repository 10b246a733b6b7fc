"""Windowed attention: softmax attention of every frame to the frames around it, in linear time and memory.

What a layer map can give a layer that should keep attention of some kind. Long audio goes through in two sweeps, one
over the keys up to a frame and one over those after it, put together by the denominators of their softmaxes.

:class:`WindowedAttention` is the mixer; :class:`Band` and the two functions under it are softmax attention within a
band, without any (T, T) matrix: the queries are cut into tiles, and each tile has the keys around it, hi - lo more than
it has queries, so that time and memory grow with T (hi - lo). :class:`GatedPositionBias` is WavLM's,
:class:`LearnedDistanceKeys` the relative positions of conformers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cald_speech.mixers.attention_heads import AttentionHeads
from cald_speech.mixers.averages import joined, packed, unpacked
from cald_speech.mixers.base import AttentionWeights, DistanceKeys, PositionBias, Sweep
from cald_speech.ops import mask_padding
from cald_speech.ops.backends import is_exported
from cald_speech.ops.recurrence import first as first_frames
from cald_speech.ops.recurrence import more_than

# Tiles of fewer queries than this are slower than the keys they spare.
LEAST_QUERIES = 32


class KeysValues(NamedTuple):
    """The frames next to a block, (B, H, up to ``window``, d) each."""

    keys: Tensor
    values: Tensor


class WindowedAttention(AttentionHeads):
    """Attention to the frames at most ``window`` away on either side; with attention's weights, what it was, cut off.

    Arguments
    ---------
    d_model, num_heads : of the attention in whose place it stands.
    window : frames on either side; 64 are 1.28 s in speech.
    position_bias : True adds WavLM's gated relative position bias, which a start from WavLM's attention needs.
    distance_keys : True adds a key for each head and each distance, which a start from a conformer's relative positions
        needs: wav2vec2-conformer's and wav2vec2-BERT's.
    bias : True gives the four projections a bias, as speech encoders' attention has.

    Example
    -------
    >>> mixer = WindowedAttention(64, num_heads=4, window=3)
    >>> mixer(torch.randn(2, 10, 64), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 1,
        *,
        window: int = 64,
        position_bias: bool = False,
        distance_keys: bool = False,
        bias: bool = True,
    ):
        super().__init__(d_model, num_heads, bias=bias)
        if window < 1:
            raise ValueError(f"window: expected at least 1 frame on either side, got {window}")
        self.window = window
        self.position_bias = GatedPositionBias(num_heads, self.head_dim, window) if position_bias else None
        self.distance_keys = LearnedDistanceKeys(num_heads, self.head_dim, window) if distance_keys else None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = mask_padding(x, lengths)  # so that nothing that stands there is multiplied, not even by zero
        q, k, v = self._heads(x)
        band = Band.over(x.size(1), x.size(1), -self.window, self.window)
        bias = self._bias(x, q, band, lengths).to(q.dtype)
        y = banded_attention(self._asking(q), k, v, band, bias)
        return mask_padding(self.out_proj(y.transpose(1, 2).flatten(2)), lengths)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (frames.transpose(1, 2) for frames in self.project(x))
        return q, k, v

    def _asking(self, q: Tensor) -> Tensor:
        """The queries (B, H, t, d) as the keys of frames get them."""
        return q if self.distance_keys is None else q + self.distance_keys.frame_bias[:, None]

    def _bias(self, x: Tensor, q: Tensor, band: "Band", lengths: Tensor | None = None) -> Tensor:
        """What is added to the scores: -inf where a key is not seen, (B * tiles, H or 1, tile, width)."""
        allowed = band.allowed(x.device, lengths)
        allowed = allowed.expand(x.size(0), *allowed.shape[-3:]).flatten(0, 1)[:, None]
        bias = torch.zeros((), dtype=x.dtype, device=x.device)
        if self.position_bias is not None:
            gates = band.queries(self.position_bias.gates(x))
            bias = gates * self.position_bias.at(band.distances(x.device))
        if self.distance_keys is not None:
            bias = bias + self.distance_keys.scores(band.queries(q), band.distances(x.device))
        return bias.where(allowed, -torch.inf)

    def sweeps(self) -> tuple[Sweep, ...]:
        """The keys up to each frame, and then those after it; either way a block needs ``window`` frames beside it."""
        return Sweep(self._attend_past), Sweep(self._finish_with_future, reverse=True)

    def _attend_past(self, x: Tensor, partial: None, state: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """(B, t, D) to averages and their totals in a row, (B, t, D + 2 H)."""
        q, k, v = self._heads(x)
        first = 0
        if state is not None:
            first = state.keys.size(2)
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        band = Band.over(q.size(2), k.size(2), -self.window, 0, first)
        y, total = banded_attention_parts(self._asking(q), k, v, band, self._bias(x, q, band))
        last = max(0, k.size(2) - self.window)
        past = packed(y.transpose(1, 2), total[..., 0].transpose(1, 2), x.dtype)
        return past, KeysValues(k[:, :, last:], v[:, :, last:])

    def _finish_with_future(self, x: Tensor, partial: Tensor, state: KeysValues | None) -> tuple[Tensor, KeysValues]:
        q, k, v = self._heads(x)
        if state is not None:
            k, v = torch.cat([k, state.keys], dim=2), torch.cat([v, state.values], dim=2)
        band = Band.over(q.size(2), k.size(2), 1, self.window)
        future, total = banded_attention_parts(self._asking(q), k, v, band, self._bias(x, q, band))
        past = unpacked(partial, self.num_heads)
        y, _ = joined(*past, future.transpose(1, 2), total[..., 0].transpose(1, 2))
        out = self.out_proj(y.to(x.dtype).flatten(2))
        return out, KeysValues(k[:, :, : self.window], v[:, :, : self.window])

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """q, k, v and o, with their biases, and the position bias or the distances' keys where there are some."""
        if weights.positions is not None and weights.distance_keys is None:
            raise ValueError(
                f"this attention's scores have {weights.positions} positions, which a window has not: keep the layer's "
                "attention (null in the layer map), or start at random"
            )
        if (weights.distance_keys is None) != (self.distance_keys is None):
            has, needed = ("no", "False") if weights.distance_keys is None else (weights.positions, "True")
            raise ValueError(
                f"this attention's scores have {has} relative positions: a start from it needs distance_keys: {needed} "
                "in the layer map's WindowedAttention. Set it, or start at random"
            )
        if weights.position_bias is not None and self.position_bias is None:
            raise ValueError(
                "this attention adds a gated position bias to its scores: a start from it needs position_bias: True in "
                "the layer map's WindowedAttention. Set it, or start at random"
            )
        if weights.position_bias is None and self.position_bias is not None:
            raise ValueError(
                "position_bias: this attention has no position bias to start from. Leave it False, or start at random"
            )
        names = super().init_from_attention(weights)
        for place in ("position_bias", "distance_keys"):
            part = getattr(self, place)
            if part is not None:
                part.copy_from(getattr(weights, place))
                names |= {f"{place}.{name}" for name, _ in part.named_parameters()}
        return names


class Band(NamedTuple):
    """Where the keys of each tile of queries stand; made by :meth:`over` for so many queries and keys."""

    lo: int
    hi: int
    first: int  # index of the key that belongs to query 0's frame
    num_queries: int
    num_keys: int
    tile: int  # queries in a tile
    start: int  # index of the first tile's first key; before 0 there is none
    width: int  # keys that a tile sees

    @classmethod
    def over(cls, num_queries: int, num_keys: int, lo: int, hi: int, first: int = 0) -> "Band":
        tile = max(LEAST_QUERIES, hi - lo)
        if not is_exported():  # a program has one tile for inputs of any length
            tile = max(1, min(num_queries, tile))
        start, stop = first + min(lo, 0), first + tile + max(hi, 0)
        if not is_exported() and tile >= num_queries:  # one tile: the keys that there are will do
            start, stop = max(0, start), min(num_keys, stop)
        return cls(lo, hi, first, num_queries, num_keys, tile, start, stop - start)

    @property
    def count(self) -> int:
        """Tiles."""
        return more_than(self.num_queries, self.tile) if is_exported() else -(-self.num_queries // self.tile)

    def distances(self, device: torch.device) -> Tensor:
        """Frames from query to key, in every tile alike: (tile, width)."""
        keys = torch.arange(self.start - self.first, self.start - self.first + self.width, device=device)
        return keys - torch.arange(self.tile, device=device)[:, None]

    def allowed(self, device: torch.device, lengths: Tensor | None = None) -> Tensor:
        """Which query sees which key, (tiles, tile, width), or with ``lengths`` (B, tiles, tile, width).

        The key of its own frame, where that is in the band, is seen even at padding: no query is without any.
        """
        distances = self.distances(device)
        keys = self.start + torch.arange(self.count, device=device)[:, None] * self.tile
        keys = keys + torch.arange(self.width, device=device)
        end = self.num_keys if lengths is None else lengths[:, None, None]
        valid = ((keys >= 0) & (keys < end))[..., None, :] | (distances == 0)
        return valid & (distances >= self.lo) & (distances <= self.hi)

    def queries(self, q: Tensor) -> Tensor:
        """(B, H, num_queries, ...) to (B * tiles, H, tile, ...)."""
        padding = self.count * self.tile - self.num_queries
        q = F.pad(q, (0, 0, 0, padding)).unflatten(2, (self.count, self.tile))
        return q.transpose(1, 2).flatten(0, 1)

    def keys(self, k: Tensor) -> Tensor:
        """(B, H, num_keys, d) to (B * tiles, H, width, d), each tile's in a row of its own."""
        length = (self.count - 1) * self.tile + self.width
        # A negative number of zeros cuts.
        k = F.pad(k, (0, 0, -self.start, self.start + length - self.num_keys))
        return k.unfold(2, self.width, self.tile).transpose(1, 2).flatten(0, 1).transpose(-1, -2)

    def joined(self, y: Tensor) -> Tensor:
        """(B * tiles, H, tile, d) back to (B, H, num_queries, d)."""
        y = y.unflatten(0, (-1, self.count)).transpose(2, 3).flatten(1, 2)
        return first_frames(y, self.num_queries).transpose(1, 2)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, band: Band, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v over the band.

    Arguments
    ---------
    q : (B, H, num_queries, d); k, v : (B, H, num_keys, d).
    band : which keys each query sees; every query must see one.
    bias : (B * tiles, H or 1, tile, width), -inf where a key is not seen.

    Returns
    -------
    (B, H, num_queries, d).

    Example
    -------
    >>> q = k = v = torch.randn(1, 2, 50, 8)
    >>> band = Band.over(50, 50, -3, 3)
    >>> bias = torch.zeros(()).where(band.allowed(q.device)[:, None], -torch.inf)
    >>> y = banded_attention(q, k, v, band, bias)
    >>> near = (torch.arange(50)[:, None] - torch.arange(50)).abs() <= 3
    >>> torch.allclose(y, F.scaled_dot_product_attention(q, k, v, attn_mask=near), atol=1e-5)
    True
    """
    return band.joined(F.scaled_dot_product_attention(band.queries(q), band.keys(k), band.keys(v), attn_mask=bias))


def banded_attention_parts(q: Tensor, k: Tensor, v: Tensor, band: Band, bias: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`banded_attention` and the logarithm of its denominator (B, H, num_queries, 1), in float32 or better.

    With them, attention over two sets of keys can be put together. A query without any key has (0, a very low number).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = band.queries(q).to(dtype) @ band.keys(k).to(dtype).transpose(-1, -2) * q.size(-1) ** -0.5 + bias
    total = scores.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    y = (scores - total).exp() @ band.keys(v).to(dtype)
    return band.joined(y), band.joined(total)


class GatedPositionBias(nn.Module):
    """A bias for each head and each distance up to ``window``, which every query scales by a gate of its own frame.

    It is the gated relative position bias of WavLM's attention (arXiv 2110.13900, section 3.1).

    Example
    -------
    >>> bias = GatedPositionBias(num_heads=2, head_dim=4, window=3)
    >>> x = torch.randn(1, 5, 8)
    >>> bias.gates(x).shape, bias.at(torch.arange(-3, 4)).shape
    (torch.Size([1, 2, 5, 1]), torch.Size([2, 7]))
    """

    def __init__(self, num_heads: int, head_dim: int, window: int):
        super().__init__()
        self.window, self.shape = window, (num_heads, head_dim)
        self.by_distance = nn.Parameter(0.02 * torch.randn(num_heads, 2 * window + 1))
        self.gate = nn.Linear(head_dim, 2)
        self.scale = nn.Parameter(torch.ones(num_heads))

    def gates(self, x: Tensor) -> Tensor:
        """(B, T, D), the mixer's input, to (B, H, T, 1)."""
        a, b = torch.sigmoid(self.gate(x.unflatten(-1, self.shape))).chunk(2, dim=-1)
        return (a * (b * self.scale[:, None] - 1.0) + 2.0).transpose(1, 2)

    def at(self, distances: Tensor) -> Tensor:
        """Distances from query to key, of any shape, to their biases (H, *shape); beyond the window, its end's."""
        return self.by_distance[:, distances.clamp(-self.window, self.window) + self.window]

    @torch.no_grad()
    def copy_from(self, source: PositionBias) -> None:
        """Take over an attention's."""
        reach = source.by_distance.size(1) // 2
        distances = torch.arange(-self.window, self.window + 1, device=source.by_distance.device)
        self.by_distance.copy_(source.by_distance[:, distances.clamp(-reach, reach) + reach])
        self.gate.weight.copy_(source.gate)
        self.gate.bias.copy_(source.gate_bias)
        self.scale.copy_(source.scale)


class LearnedDistanceKeys(nn.Module):
    """A key for each head and each distance up to ``window``, and what each head adds to its queries.

    They are the relative positions of Shaw et al. (arXiv 1803.02155), and, multiplied out, of Transformer-XL
    (arXiv 1901.02860, section 3.3).

    Example
    -------
    >>> keys = LearnedDistanceKeys(num_heads=2, head_dim=4, window=3)
    >>> keys.scores(torch.randn(1, 2, 5, 4), torch.arange(5) - torch.arange(5)[:, None]).shape
    torch.Size([1, 2, 5, 5])
    """

    def __init__(self, num_heads: int, head_dim: int, window: int):
        super().__init__()
        self.window = window
        self.by_distance = nn.Parameter(0.02 * torch.randn(num_heads, 2 * window + 1, head_dim))
        self.frame_bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def scores(self, q: Tensor, distances: Tensor) -> Tensor:
        """Queries (B, H, t, d) and their distances to keys (t, s) to (B, H, t, s); beyond the window, its end's."""
        every = (q + self.distance_bias[:, None]) @ self.by_distance.transpose(1, 2) * q.size(-1) ** -0.5
        places = distances.clamp(-self.window, self.window) + self.window
        return every.gather(3, places.expand(*every.shape[:2], *places.shape))

    @torch.no_grad()
    def copy_from(self, source: DistanceKeys) -> None:
        """Take over an attention's."""
        distances = torch.arange(-self.window, self.window + 1, device=self.by_distance.device)
        self.by_distance.copy_(source.at(distances))
        for own, given in ((self.frame_bias, source.frame_bias), (self.distance_bias, source.distance_bias)):
            own.zero_() if given is None else own.copy_(given)
