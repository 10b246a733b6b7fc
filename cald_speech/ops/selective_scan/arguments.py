"""What the selective scan accepts: one check for every backend."""

from torch import Tensor

from cald_speech.ops.backends import values_are_checked
from cald_speech.ops.lengths import valid_frames
from cald_speech.ops.ssd.arguments import check_signs


def check_arguments(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> None:
    """Raise ValueError where shapes, dtypes or devices do not fit x (B, T, D_inner).

    Example
    -------
    >>> import torch
    >>> x, B = torch.ones(1, 3, 4), torch.ones(1, 3, 1, 5)
    >>> check_arguments(x, torch.ones(1, 3, 4), -torch.ones(4, 5), B, B, None, None)
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a float tensor (B, T, D_inner), got {x.dtype} of shape {tuple(x.shape)}")
    if B.dim() != 4:
        raise ValueError(f"B: expected (B, T, G, N), got shape {tuple(B.shape)}")
    batch, num_frames, channels = x.shape
    groups, d_state = B.shape[2:]
    if groups == 0 or channels % groups:
        raise ValueError(f"B: expected a number of groups that divides the {channels} channels, got {groups}")
    expected = {
        "dt": (dt, (batch, num_frames, channels)),
        "A": (A, (channels, d_state)),
        "B": (B, (batch, num_frames, groups, d_state)),
        "C": (C, (batch, num_frames, groups, d_state)),
        "D": (D, (channels,)),
        "initial_state": (initial_state, (batch, channels, d_state)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape} to go with x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a float tensor, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} like x, got {tensor.device}")


def check_values(dt: Tensor, A: Tensor, lengths: Tensor | None) -> None:
    """Raise ValueError unless A < 0 everywhere and dt > 0 on every valid frame; in debug mode alone.

    It waits for the device, which is why ``CALD_SPEECH_DEBUG=1`` asks for it. What stands at padding is not looked at.
    """
    if not values_are_checked():
        return
    if lengths is not None:
        padding = ~valid_frames(lengths, dt.size(1))
        dt = dt.masked_fill(padding[..., None], 1.0)
    check_signs(dt, A)
