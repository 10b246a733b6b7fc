"""Lengths instead of masks: how many frames of each right-padded sequence are valid."""

import torch
from torch import Tensor

from cald_speech.ops.backends import check_is_tensor, values_can_be_seen


def check_lengths(lengths: Tensor | None, batch: int, num_frames: int) -> None:
    """Raise ValueError unless ``lengths`` is None or a (batch,) integer tensor with values in [0, num_frames].

    The values are looked at on a CPU only: on a GPU that would make every call wait for the device. While a graph is
    traced there are none; under torch.compile they are looked at when it runs.

    Example
    -------
    >>> check_lengths(torch.tensor([3, 5]), batch=2, num_frames=5)
    """
    if lengths is None:
        return
    check_is_tensor("lengths", lengths)
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths: expected an integer tensor of shape ({batch},), "
            f"got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    seen = values_can_be_seen(lengths) and lengths.device.type == "cpu"
    if seen and batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= num_frames:
        raise ValueError(f"lengths: expected values in [0, {num_frames}], got {lengths.tolist()}")


def valid_frames(lengths: Tensor, num_frames: int) -> Tensor:
    """(B,) lengths to a (B, num_frames) boolean mask that is True on valid frames.

    Example
    -------
    >>> valid_frames(torch.tensor([1, 3]), 3).tolist()
    [[True, False, False], [True, True, True]]
    """
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def mask_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Set the padded frames of ``x`` (B, T, ...) to zero, whatever stood there (NaN too).

    Example
    -------
    >>> mask_padding(torch.ones(1, 3, 1), torch.tensor([2])).flatten().tolist()
    [1.0, 1.0, 0.0]
    """
    if lengths is None:
        return x
    padding = ~valid_frames(lengths, x.size(1))
    return x.masked_fill(padding.reshape(*padding.shape, *(1,) * (x.dim() - 2)), 0)
