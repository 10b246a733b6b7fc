"""SSD in chunks over a whole batch of short sequences at once: plain autograd, few and small products.

Same mathematics as :mod:`~cald_speech.ops.ssd.torch_chunked`, which goes sequence by sequence and block by block: where
a sequence has little work, the calls themselves cost more than what they compute.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech.ops.lengths import mask_padding
from cald_speech.ops.ssd.torch_blocks import CHUNK_SIZE


def ssd_batched(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same signature and result as :func:`cald_speech.ops.ssd`, which documents it. Example: see there."""
    batch, num_frames, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A frame with dt = 0 and x = 0 leaves the state as it is: that is all padding needs, in either direction.
    x, dt, B, C = (mask_padding(v, lengths) for v in (x, dt, B, C))
    chunk_size = max(1, min(chunk_size or CHUNK_SIZE, num_frames))
    # Split every tensor into (batch, group, head in group, chunk, frame in chunk, ...).
    per_head = (groups, heads // groups)
    xs = _split(x.to(dtype), chunk_size, per_head)
    dts = _split(dt.to(dtype)[..., None], chunk_size, per_head)
    Bs = _split(B.to(dtype), chunk_size, (groups, 1))
    Cs = _split(C.to(dtype), chunk_size, (groups, 1))
    log_decay = dts[..., 0] * A.to(dtype).reshape(1, *per_head, 1, 1)
    cum, total = _running_sum(log_decay, reverse)

    weighted = xs * dts
    y = _within_chunks(weighted, Bs, Cs, cum, reverse)
    # What each chunk adds to the state, (b, g, r, chunk, P, N), and the state on entering each chunk.
    added = (weighted * (total - cum).exp().to(dtype)[..., None]).transpose(-1, -2) @ Bs
    state = initial_state
    if state is None:
        state = x.new_zeros(batch, heads, head_dim, d_state, dtype=dtype)
    entering, state = _across_chunks(added, total.exp().to(dtype)[..., None], state.to(dtype), reverse)
    y = y + (Cs @ entering.transpose(-1, -2)) * cum.exp().to(dtype)[..., None]
    y = y.permute(0, 3, 4, 1, 2, 5).reshape(batch, -1, heads, head_dim)[:, :num_frames]
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    y = mask_padding(y, lengths).to(x.dtype)
    return (y, state) if return_final_state else y


def _split(v: Tensor, chunk_size: int, per_head: tuple[int, int]) -> Tensor:
    """(b, T, H, d) to (b, g, r, chunk, frame, d); a last, partial chunk is filled up with zeros."""
    v = F.pad(v, (0, 0, 0, 0, 0, -v.size(1) % chunk_size))
    return v.unflatten(1, (-1, chunk_size)).unflatten(3, per_head).permute(0, 3, 4, 1, 2, 5)


def _running_sum(log_decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Sum of the log decays from the chunk's entry to each frame, in the order of the scan, and over the whole chunk.

    In float64: differences of long float32 sums lose up to 2e-5 of the decay.
    """
    log_decay = log_decay.double()
    cum = log_decay.cumsum(-1)
    total = cum[..., -1:]
    return (total - cum + log_decay if reverse else cum), total


def _within_chunks(weighted: Tensor, B: Tensor, C: Tensor, cum: Tensor, reverse: bool) -> Tensor:
    """The chunk's own frames: decayed C B^T, masked to the past of the scan, times dt x."""
    size = cum.size(-1)
    future = torch.ones(size, size, dtype=torch.bool, device=cum.device).triu(1)
    if reverse:
        future = future.T
    # Masked before the exp, so that no exp sees a positive argument.
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(future, -torch.inf).to(weighted.dtype).exp()
    return (C @ B.transpose(-1, -2) * decay) @ weighted


def _across_chunks(added: Tensor, decay: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Carry the state over the chunks; returns it at the entry of each chunk, and after the last."""
    state = state.reshape(added.shape[:3] + added.shape[4:])
    num_chunks = added.size(3)
    entering = [state] * num_chunks
    for c in reversed(range(num_chunks)) if reverse else range(num_chunks):
        entering[c] = state
        state = state * decay[:, :, :, c] + added[:, :, :, c]
    entering = torch.stack(entering, dim=3) if num_chunks else added
    return entering, state.flatten(1, 2)
