"""The gated delta rule in chunks of matrix products (the WY form: Yang et al., arXiv 2406.06484 and 2412.06464).

Within a chunk the state is the one before it, decayed, plus a sum of what its frames wrote, ``u_j k_j^T``, decayed as
well. What frame i writes depends on what those before it wrote, since it is told what the state already answers:

    u_i = beta_i (v_i - S (e^{G_i} k_i) - sum_{j<i} u_j (k_i . e^{G_i - G_j} k_j))

with G the running sum of g from the chunk's beginning. That is a triangular system for each chunk. Its solutions for
the right sides beta v and beta e^G k are found for all chunks at once; then one chunk after the other only multiplies:

    U   = U_v - U_k S
    y_i = S (e^{G_i} q_i) + sum_{j<=i} u_j (q_i . e^{G_i - G_j} k_j)
    S  <- S e^{G} + sum_j u_j (e^{G - G_j} k_j)^T

No exponent is positive: decays from frame j to frame i are taken as such. With a decay for each channel ``products``
does that in blocks of a few frames, between which decays are split at the block's beginning: both parts are at most 1.

Plain autograd, a whole batch and some frames at once. A reverse scan is one over frames in the other order: a padded
frame writes nothing and forgets nothing, wherever it stands.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech.ops.bad_frames import all_finite, without, write_before
from cald_speech.ops.lengths import mask_padding
from cald_speech.ops.recurrence import in_groups

CHUNK_SIZE = 64
CHANNEL_CHUNK_SIZE = 32  # where every channel has its decay
FRAMES_PER_BLOCK = 8  # of such a chunk: within a block every pair of frames has its decays, N of them
FRAMES_AT_ONCE = 4096  # what is kept for the backward pass is linear in all frames, what is not in these
LARGE = 1e12  # in frames that something infinite came of: a product of three such numbers is finite
STRONGEST_LOG_DECAY = -104.0  # exp of it is 0 in float32: a stronger decay is no different, and -inf makes no NaN


def gated_delta_torch(q, k, v, beta, g, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.gated_delta`, which documents arguments and result."""
    tensors, options = (q, k, v, beta, g, initial_state), {"reverse": reverse, "chunk_size": chunk_size}
    *framewise, state = tensors
    framewise = [mask_padding(tensor, lengths) for tensor in framewise]
    y, final = scan(*framewise, state, **options)
    # Whatever is not finite stays in the state: one look at its end says whether a frame is bad (but for q's, which
    # reach their own frame alone). Waits for the device, where that is not the CPU.
    if v.size(1) > 1 and not all_finite(final):
        with torch.no_grad():  # the gradients are those of the scan as it was
            write_unspoilt(y, *framewise, state, **options)
    y = mask_padding(y, lengths)
    return (y, final) if return_final_state else y


def write_unspoilt(y: Tensor, q, k, v, beta, g, initial_state, *, reverse, chunk_size) -> None:
    """Into ``y``, at the frames that come before every bad one of their head, by a scan without the bad ones."""
    per_group = v.size(2) // k.size(2)
    bad_maps, bad_values, bad_beta = (~(tensor.abs() < LARGE) for tensor in (k, v, beta))
    bad_g = ~(g < math.log(LARGE))
    bad = bad_maps.any(-1).repeat_interleave(per_group, dim=2) | bad_values.any(-1) | bad_beta
    bad = bad | (bad_g.any(-1) if g.dim() == 4 else bad_g)
    framewise = ((k, bad_maps), (v, bad_values), (beta, bad_beta), (g, bad_g))
    k, v, beta, g = (without(tensor, bad_there) for tensor, bad_there in framewise)
    unspoilt, _ = scan(q, k, v, beta, g, initial_state, reverse=reverse, chunk_size=chunk_size)
    write_before(y, bad[..., None], unspoilt, reverse=reverse)


def scan(q, k, v, beta, g, initial_state, *, reverse, chunk_size) -> tuple[Tensor, Tensor]:
    """y and the final state, of frames without padding or with zeros there."""
    num_frames, state = v.size(1), state_before(initial_state, v, k)
    dtype = state.dtype
    per_channel = g.dim() == 4
    g = g if per_channel else g[..., None]
    framewise = (q, k, v, beta[..., None], g)
    if reverse:
        framewise = [tensor.flip(1) for tensor in framewise]
    chunk_size = min(chunk_size or (CHANNEL_CHUNK_SIZE if per_channel else CHUNK_SIZE), max(1, num_frames))
    outputs = []
    for start in range(0, num_frames, frames_at_once(chunk_size)):
        piece = [tensor[:, start : start + frames_at_once(chunk_size)].to(dtype) for tensor in framewise]
        y, state = scan_piece(*piece, state, chunk_size)
        outputs.append(y)
    y = torch.cat(outputs, dim=1) if outputs else v.to(dtype)
    return (y.flip(1) if reverse else y).to(v.dtype), state.flatten(1, 2).transpose(2, 3)


def state_before(initial_state: Tensor | None, v: Tensor, k: Tensor) -> Tensor:
    """The initial state with the channels of the keys as its rows, (B, G, R, N, P), in float32 at least."""
    batch, _, heads, head_dim = v.shape
    groups, d_state = k.shape[2:]
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        initial_state = v.new_zeros(batch, heads, head_dim, d_state, dtype=dtype)
    return initial_state.to(dtype).transpose(2, 3).unflatten(1, (groups, -1))


def chunk_decays(g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of chunks' g (..., C, 1 or N): its running sum, and the decays to each frame, from it to the end, and of all."""
    # In float64: differences of long float32 sums lose up to 1e-5 of the decay.
    log_decay = g.double().clamp(min=STRONGEST_LOG_DECAY).cumsum(-2)
    total = log_decay[..., -1:, :]
    return log_decay, *(exponent.to(dtype).exp() for exponent in (log_decay, total - log_decay, total))


def frames_at_once(chunk_size: int) -> int:
    """Whole chunks."""
    return -(-FRAMES_AT_ONCE // chunk_size) * chunk_size


def scan_piece(q, k, v, beta, g, state, chunk_size) -> tuple[Tensor, Tensor]:
    """y (B, T, H, P) and the state after the piece; beta and g have a last axis, of 1 or of the channels."""
    num_frames, heads = v.shape[1:3]
    groups = k.size(2)
    per_head = (groups, heads // groups)
    chunks = (-(-num_frames // chunk_size), chunk_size)
    q, k = (split(tensor, chunks, (groups, 1)) for tensor in (q, k))
    v, beta, g = (split(tensor, chunks, per_head) for tensor in (v, beta, g))
    log_decay, into, out, through = chunk_decays(g, v.dtype)
    of_queries, of_keys = products(q, k, log_decay)
    # (1 + beta L) U = beta (v - e^G k S), its diagonal not looked at: U = U_v - U_k S.
    right = torch.cat([v, into * k], dim=-1) * beta
    solved = torch.linalg.solve_triangular(beta * of_keys, right, upper=False, unitriangular=True)
    of_values, of_state = solved.split((v.size(-1), k.size(-1)), dim=-1)
    decayed_q, decayed_k = into * q, (out * k).transpose(-1, -2)
    through = through.transpose(-1, -2)
    outputs = []
    for c in range(v.size(3)):
        written = of_values[:, :, :, c] - of_state[:, :, :, c] @ state
        outputs.append(decayed_q[:, :, :, c] @ state + of_queries[:, :, :, c] @ written)
        state = through[:, :, :, c] * state + decayed_k[:, :, :, c] @ written
    y = torch.stack(outputs, dim=3)
    return y.permute(0, 3, 4, 1, 2, 5).flatten(1, 2)[:, :num_frames].flatten(2, 3), state


def split(v: Tensor, chunks: tuple[int, int], per_head: tuple[int, int]) -> Tensor:
    """(B, T, H, d) to (B, G, R, chunk, frame, d); a last, partial chunk is filled up with zeros."""
    return in_groups(v, *chunks).unflatten(3, per_head).permute(0, 3, 4, 1, 2, 5)


def products(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """q_i . e^{G_i - G_j} k_j for j <= i, and k_i . e^{G_i - G_j} k_j for j < i; else 0. (..., C, C) each."""
    if log_decay.size(-1) == 1:
        decay = decays(log_decay, k.dtype)[..., 0]
        # A product of large numbers may be infinite, and a decay of 0 would make NaN of it.
        return (q @ k.transpose(-1, -2)).tril() * decay, (k @ k.transpose(-1, -2) * decay).tril(-1)
    size, by_row = k.size(-2), []
    for start in range(0, size, FRAMES_PER_BLOCK):
        end = min(start + FRAMES_PER_BLOCK, size)
        rows = torch.stack([tensor.expand(log_decay.shape)[..., start:end, :] for tensor in (q, k)])
        of_block, keys = log_decay[..., start:end, :], k.expand(log_decay.shape)
        within = (rows[..., None, :] * (decays(of_block, k.dtype) * keys[..., None, start:end, :])).sum(-1)
        if start:
            before = log_decay[..., start - 1 : start, :]
            from_there = (of_block - before).to(k.dtype).exp() * rows
            to_there = (before - log_decay[..., :start, :]).to(k.dtype).exp() * keys[..., :start, :]
            within = torch.cat([from_there @ to_there.transpose(-1, -2), within], dim=-1)
        by_row.append(F.pad(within, (0, size - end)))
    of_queries, of_keys = torch.cat(by_row, dim=-2)
    return of_queries, of_keys.tril(-1)


def decays(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """``e^{G_i - G_j}`` of frame i and j <= i, else 0: (..., C, C, d) from (..., C, d)."""
    size = log_decay.size(-2)
    future = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)[..., None]
    # Masked before the exp, so that no exp sees a positive argument.
    differences = log_decay[..., :, None, :] - log_decay[..., None, :, :]
    return differences.masked_fill(future, -torch.inf).to(dtype).exp()
