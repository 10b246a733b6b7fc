"""SSD for ``torch.export``: the four steps of ``torch_batched.py`` without a loop over chunks, so for any length.

From chunk to chunk all pairs of them are multiplied, which within an hour of audio costs less than what is inside the
chunks, and makes a graph of few operations with sizes that are quickly worked out.
It takes no second look at frames that are NaN: within its chunk and those after it, such a frame spoils its sequence.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech.ops.recurrence import more_than
from cald_speech.ops.ssd.torch_batched import scan_in_chunks
from cald_speech.ops.ssd.torch_blocks import CHUNK_SIZE
from cald_speech.ops.ssd.two_scans import bidirectional_by, pair_by


def ssd_traced(x, dt, A, B, C, D, *, lengths, reverse, initial_state, return_final_state, chunk_size):
    """:func:`cald_speech.ops.ssd`, which documents arguments and result."""
    options = {"lengths": lengths, "reverse": reverse, "initial_state": initial_state}
    chunks = (more_than(x.size(1), CHUNK_SIZE), CHUNK_SIZE)
    y, state = scan_in_chunks(x, dt, A, B, C, D, **options, chunks=chunks, across=_across_chunks)
    return (y, state) if return_final_state else y


ssd_bidirectional_traced = bidirectional_by(ssd_traced)
ssd_pair_traced = pair_by(ssd_traced)


def _across_chunks(added: Tensor, log_decay: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """As that of ``torch_batched.py``: each entry is a sum over the chunks before it, with what is left of each."""
    if reverse:
        added, log_decay = added.flip(3), log_decay.flip(3)
    # The initial state is what a chunk before the first one added.
    added = torch.cat([state.reshape(added.shape[:3] + added.shape[4:]).unsqueeze(3), added], dim=3)
    sums = F.pad(log_decay.squeeze(-1), (1, 0)).cumsum(-1)
    place = torch.arange(added.size(3), device=added.device)
    # Masked before the exp, so that no exp sees a positive argument.
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(place[:, None] < place, -torch.inf)
    states = (between.to(added.dtype).exp() @ added.flatten(4)).unflatten(4, added.shape[4:])
    entering = states[:, :, :, :-1]
    return entering.flip(3) if reverse else entering, states[:, :, :, -1].flatten(1, 2)
