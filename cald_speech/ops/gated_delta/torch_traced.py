"""The gated delta rule for ``torch.export``: the chunks of ``torch_chunked.py`` without a loop over them.

From chunk to chunk the state is multiplied by a matrix and added to, which two chunks after one another do as well:

    S <- (Diag(e^G) - K^T U_k) S + K^T U_v        with K the chunk's keys, decayed to its end

A chunk's triangular system is solved by doubling, which needs nothing but products.
"""

import torch
from torch import Tensor

from cald_speech.ops.gated_delta.torch_chunked import chunk_decays, products, split, state_before
from cald_speech.ops.lengths import mask_padding
from cald_speech.ops.recurrence import first, more_than, recurrence

CHUNK_SIZE = 32  # a power of two
LEVELS = 4  # 32 frames times 16^4 chunks: more than eleven hours at 50 a second


def gated_delta_traced(q, k, v, beta, g, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.gated_delta`, which documents arguments and result."""
    framewise = [mask_padding(tensor, lengths) for tensor in (q, k, v, beta, g)]
    y, state = scan(*framewise, initial_state, reverse=reverse)
    y = mask_padding(y, lengths)
    return (y, state) if return_final_state else y


def scan(q, k, v, beta, g, initial_state, *, reverse) -> tuple[Tensor, Tensor]:
    """y and the final state, of frames with zeros at padding."""
    num_frames, heads, head_dim = v.shape[1:]
    groups, d_state = k.shape[2:]
    state = state_before(initial_state, v, k)
    dtype = state.dtype
    framewise = (q, k, v, beta[..., None], g if g.dim() == 4 else g[..., None])
    if reverse:
        framewise = [tensor.flip(1) for tensor in framewise]
    per_head = (groups, heads // groups)
    chunks = (more_than(num_frames, CHUNK_SIZE), CHUNK_SIZE)
    shapes = ((groups, 1), (groups, 1), per_head, per_head, per_head)
    q, k, values, beta, g = (split(t.to(dtype), chunks, s) for t, s in zip(framewise, shapes, strict=True))
    log_decay, into, out, through = chunk_decays(g, dtype)
    of_queries, of_keys = products(q, k, log_decay)
    solved = unit_inverse(beta * of_keys) @ (torch.cat([values, into * k], dim=-1) * beta)
    of_values, of_state = solved.split((head_dim, d_state), dim=-1)
    decayed_k = (out * k).transpose(-1, -2)
    kept = torch.eye(d_state, dtype=dtype, device=v.device) * through - decayed_k @ of_state
    kept, added = (matrix.permute(0, 3, 1, 2, 4, 5) for matrix in (kept, decayed_k @ of_values))
    after = recurrence(kept, added, state, levels=LEVELS, times=torch.matmul)
    entering = first(torch.cat([state[:, None], after], dim=1), chunks[0]).permute(0, 2, 3, 1, 4, 5)
    y = (into * q) @ entering + of_queries @ (of_values - of_state @ entering)
    y = first(y.permute(0, 3, 4, 1, 2, 5).flatten(1, 2), num_frames).flatten(2, 3)
    return (y.flip(1) if reverse else y).to(v.dtype), after[:, -1].flatten(1, 2).transpose(2, 3)


def unit_inverse(lower: Tensor) -> Tensor:
    """Of I + ``lower`` (..., C, C), strictly lower triangular, C a power of two.

    Blocks on the diagonal whose inverse is known are joined in pairs. A sum of powers would lose digits.

    Example
    -------
    >>> lower = torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    >>> unit_inverse(lower).tolist()
    [[1.0, 0.0], [-0.5, 1.0]]
    """
    size = lower.size(-1)
    row, column = torch.arange(size, device=lower.device)[:, None], torch.arange(size, device=lower.device)
    inverse, block = torch.eye(size, dtype=lower.dtype, device=lower.device), 1
    while block < size:
        same_pair = row // (2 * block) == column // (2 * block)
        between = lower.masked_fill(~(same_pair & (row // block > column // block)), 0)
        inverse = inverse - inverse @ between @ inverse
        block *= 2
    return inverse
