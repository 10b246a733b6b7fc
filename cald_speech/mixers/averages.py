"""Weighted averages over some keys, with the logarithms of their weights' sums: what two sets of keys need to be one.

An average ``y`` (B, T, H, P) of values has weights that sum to exp(``total``), (B, T, H). Over two sets that share no
key, the average is the mean of both averages, each weighed by its share of the sum; softmax attention in pieces, and
what stands in for it, are put together so.
"""

import torch
from torch import Tensor

NO_KEYS = -1e4  # the total of an average over no keys, or over none that counts; half precision holds it too


def joined(y: Tensor, total: Tensor, other: Tensor, other_total: Tensor) -> tuple[Tensor, Tensor]:
    """The average over the keys of both, and its total.

    Example
    -------
    >>> one, two = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 5.0)
    >>> y, total = joined(one, torch.log(torch.ones(1, 1, 1)), two, torch.log(torch.full((1, 1, 1), 3.0)))
    >>> y.item(), round(total.exp().item(), 5)  # one key of weight 1, and some of 3 together
    (4.0, 4.0)
    """
    share = torch.sigmoid(other_total - total)
    return y + share[..., None] * (other - y), torch.logaddexp(total, other_total)


def packed(y: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """Both in one tensor of ``dtype``, (B, T, H P + 2 H), for what is kept of every frame.

    The total is kept in two numbers: one of half precision would move the balance of two averages by some per cent.
    """
    coarse = total.to(dtype)
    return torch.cat([y.flatten(-2).to(dtype), coarse, (total - coarse).to(dtype)], dim=-1)


def unpacked(kept: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`packed`, in float32 or better.

    Example
    -------
    >>> y, total = torch.randn(1, 5, 2, 3), torch.randn(1, 5, 2)
    >>> again, its_total = unpacked(packed(y, total, torch.bfloat16), 2)
    >>> torch.allclose(again, y, rtol=1e-2), torch.allclose(its_total, total, atol=1e-3)
    (True, True)
    """
    kept = kept.to(torch.promote_types(kept.dtype, torch.float32))
    y, coarse, fine = kept.split((kept.size(-1) - 2 * num_heads, num_heads, num_heads), dim=-1)
    return y.unflatten(-1, (num_heads, -1)), coarse + fine
