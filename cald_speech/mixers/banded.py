"""Softmax attention within a band: every query sees the keys from ``lo`` to ``hi`` frames away, and no (T, T) is made.

The queries are cut into blocks; each block has the keys around it, hi - lo more than it has queries. Time and memory
grow with T (hi - lo).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Blocks of fewer queries than this are slower than the keys they spare.
LEAST_QUERIES = 32


class Band(NamedTuple):
    """Where the keys of each block stand; made by :meth:`over` for so many queries and keys."""

    lo: int
    hi: int
    first: int  # index of the key that belongs to query 0's frame
    num_queries: int
    num_keys: int
    block: int  # queries in a block
    start: int  # index of the first block's first key; before 0 there is none
    width: int  # keys that a block sees

    @classmethod
    def over(cls, num_queries: int, num_keys: int, lo: int, hi: int, first: int = 0) -> "Band":
        block = max(1, min(num_queries, max(LEAST_QUERIES, hi - lo)))
        start, stop = first + min(lo, 0), first + block + max(hi, 0)
        if block >= num_queries:  # one block: the keys that there are will do
            start, stop = max(0, start), min(num_keys, stop)
        return cls(lo, hi, first, num_queries, num_keys, block, start, stop - start)

    @property
    def count(self) -> int:
        """Blocks."""
        return -(-self.num_queries // self.block)

    def distances(self, device: torch.device) -> Tensor:
        """Frames from query to key, in every block alike: (block, width)."""
        keys = torch.arange(self.start - self.first, self.start - self.first + self.width, device=device)
        return keys - torch.arange(self.block, device=device)[:, None]

    def allowed(self, device: torch.device, lengths: Tensor | None = None) -> Tensor:
        """Which query sees which key, (blocks, block, width), or with ``lengths`` (B, blocks, block, width).

        The key of its own frame, where that is in the band, is seen even at padding: no query is without any.
        """
        distances = self.distances(device)
        keys = self.start + torch.arange(self.count, device=device)[:, None] * self.block
        keys = keys + torch.arange(self.width, device=device)
        end = self.num_keys if lengths is None else lengths[:, None, None]
        valid = ((keys >= 0) & (keys < end))[..., None, :] | (distances == 0)
        return valid & (distances >= self.lo) & (distances <= self.hi)

    def queries(self, q: Tensor) -> Tensor:
        """(B, H, num_queries, ...) to (B * blocks, H, block, ...)."""
        padding = self.count * self.block - self.num_queries
        q = F.pad(q, (0, 0, 0, padding)).unflatten(2, (self.count, self.block))
        return q.transpose(1, 2).flatten(0, 1)

    def keys(self, k: Tensor) -> Tensor:
        """(B, H, num_keys, d) to (B * blocks, H, width, d), each block's in a row of its own."""
        length = (self.count - 1) * self.block + self.width
        # A negative number of zeros cuts.
        k = F.pad(k, (0, 0, -self.start, self.start + length - self.num_keys))
        return k.unfold(2, self.width, self.block).transpose(1, 2).flatten(0, 1).transpose(-1, -2)

    def joined(self, y: Tensor) -> Tensor:
        """(B * blocks, H, block, d) back to (B, H, num_queries, d)."""
        return y.unflatten(0, (-1, self.count)).transpose(1, 2).flatten(2, 3)[:, :, : self.num_queries]


def banded_attention(q: Tensor, k: Tensor, v: Tensor, band: Band, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v over the band.

    Arguments
    ---------
    q : (B, H, num_queries, d); k, v : (B, H, num_keys, d).
    band : which keys each query sees; every query must see one.
    bias : (B * blocks, H or 1, block, width), -inf where a key is not seen.

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
