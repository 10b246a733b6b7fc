"""SSD in chunks, as the paper lists it (Dao & Gu, arXiv 2405.21060, listing 1): four steps, plain autograd.

The recurrence of ``naive.py`` over a chunk of frames is one matrix: with ``cum`` the running sum of dt A, frame i gets
``C_i B_j exp(cum_i - cum_j) dt_j x_j`` from every frame j <= i, and ``exp(cum_i) C_i S`` from the state S before them.

1. *Within chunks*: the outputs that a chunk's own frames give each other, a decayed and masked attention matrix.
2. *Chunk states*: what a chunk adds to the state, ``sum_j exp(total - cum_j) dt_j x_j B_j^T``.
3. *Across chunks*: the recurrence over chunks alone, ``S <- exp(total) S + added``.
4. *State to output*: what the state before a chunk gives to its frames.

It takes a whole batch at once, which is the fastest way for short sequences, where calls cost more than what they
compute. :mod:`~cald_speech.ops.ssd.torch_chunked` takes the same steps sequence by sequence and block by block.
"""

import torch
from torch import Tensor

from cald_speech.ops.lengths import mask_padding
from cald_speech.ops.recurrence import first, in_groups
from cald_speech.ops.ssd.torch_blocks import CHUNK_SIZE


def ssd_batched(x, dt, A, B, C, D, *, lengths, reverse, initial_state, chunk_size):
    """y and the final state of :func:`cald_speech.ops.ssd`, which documents arguments and result."""
    options = {"lengths": lengths, "reverse": reverse, "initial_state": initial_state}
    chunk_size = max(1, min(chunk_size or CHUNK_SIZE, x.size(1)))
    chunks = (-(-x.size(1) // chunk_size), chunk_size)
    return scan_in_chunks(x, dt, A, B, C, D, **options, chunks=chunks, across=_across_chunks)


def scan_in_chunks(x, dt, A, B, C, D, *, lengths, reverse, initial_state, chunks, across):
    """The same, with so many chunks of so many frames, and a function for the third step."""
    batch, num_frames, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A frame with dt = 0 and x = 0 leaves the state as it is: that is all padding needs, in either direction.
    x, dt, B, C = (mask_padding(v, lengths) for v in (x, dt, B, C))
    # Split every tensor into (batch, group, head in group, chunk, frame in chunk, ...).
    per_head = (groups, heads // groups)
    xs = _split(x.to(dtype), chunks, per_head)
    dts = _split(dt.to(dtype)[..., None], chunks, per_head)
    Bs = _split(B.to(dtype), chunks, (groups, 1))
    Cs = _split(C.to(dtype), chunks, (groups, 1))
    log_decay = dts[..., 0] * A.to(dtype).reshape(1, *per_head, 1, 1)
    cum, total = _running_sum(log_decay, reverse)

    weighted = xs * dts
    # 1. Within chunks.
    y = _within_chunks(weighted, Bs, Cs, cum, reverse)
    # 2. Chunk states, (b, g, r, chunk, P, N).
    added = (weighted * (total - cum).exp().to(dtype)[..., None]).transpose(-1, -2) @ Bs
    # 3. Across chunks: the state on entering each.
    state = initial_state
    if state is None:
        state = x.new_zeros(batch, heads, head_dim, d_state, dtype=dtype)
    entering, state = across(added, total, state.to(dtype), reverse)
    # 4. State to output.
    y = y + (Cs @ entering.transpose(-1, -2)) * cum.exp().to(dtype)[..., None]
    y = first(y.permute(0, 3, 4, 1, 2, 5).reshape(batch, -1, heads, head_dim), num_frames)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    return mask_padding(y, lengths).to(x.dtype), state


def _split(v: Tensor, chunks: tuple[int, int], per_head: tuple[int, int]) -> Tensor:
    """(b, T, H, d) to (b, g, r, chunk, frame, d); a last, partial chunk is filled up with zeros."""
    return in_groups(v, *chunks).unflatten(3, per_head).permute(0, 3, 4, 1, 2, 5)


def _running_sum(log_decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Sum of the log decays from the chunk's entry to each frame, in the order of the scan, and over the whole chunk.

    In float64: differences of long float32 sums lose up to 2e-5 of the decay.
    """
    log_decay = log_decay.double()
    if reverse:  # not as a difference from the total, from which one huge step would take every digit
        cum = log_decay.flip(-1).cumsum(-1).flip(-1)
        return cum, cum[..., :1]
    cum = log_decay.cumsum(-1)
    return cum, cum[..., -1:]


def _within_chunks(weighted: Tensor, B: Tensor, C: Tensor, cum: Tensor, reverse: bool) -> Tensor:
    """The chunk's own frames: decayed C B^T, masked to the past of the scan, times dt x."""
    size = cum.size(-1)
    future = torch.ones(size, size, dtype=torch.bool, device=cum.device).triu(1)
    if reverse:
        future = future.T
    # Masked before the exp, so that no exp sees a positive argument.
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(future, -torch.inf).to(weighted.dtype).exp()
    # A product of large numbers may be infinite, and a decay of 0 would make NaN of it.
    products = C @ B.transpose(-1, -2)
    return ((products.triu() if reverse else products.tril()) * decay) @ weighted


def _across_chunks(added: Tensor, log_decay: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Carry the state over the chunks; returns it at the entry of each chunk, and after the last.

    added (b, g, r, chunk, N, P) and log_decay (b, g, r, chunk, 1), of whole chunks.
    """
    decay = log_decay.exp().to(added.dtype)[..., None]
    state = state.reshape(added.shape[:3] + added.shape[4:])
    num_chunks = added.size(3)
    entering = [state] * num_chunks
    for c in reversed(range(num_chunks)) if reverse else range(num_chunks):
        entering[c] = state
        state = state * decay[:, :, :, c] + added[:, :, :, c]
    entering = torch.stack(entering, dim=3) if num_chunks else added
    return entering, state.flatten(1, 2)
