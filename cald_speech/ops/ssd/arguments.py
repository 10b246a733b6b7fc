"""What the SSD ops accept: one check for every backend."""

from torch import Tensor

from cald_speech.ops.backends import values_are_checked
from cald_speech.ops.lengths import check_lengths, valid_frames


def check_arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Raise ValueError where shapes, dtypes, devices or lengths do not fit x (B, T, H, P); in debug mode values too.

    Example
    -------
    >>> import torch
    >>> x, B = torch.ones(1, 3, 4, 2), torch.ones(1, 3, 1, 5)
    >>> check_arguments(x, torch.ones(1, 3, 4), -torch.ones(4), B, B, None, None, None)
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected a float tensor (B, T, H, P), got {x.dtype} of shape {tuple(x.shape)}")
    if B.dim() != 4:
        raise ValueError(f"B: expected (B, T, G, N), got shape {tuple(B.shape)}")
    batch, num_frames, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"B: expected a number of groups that divides the {heads} heads, got {groups}")
    expected = {
        "dt": (dt, (batch, num_frames, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, num_frames, groups, d_state)),
        "C": (C, (batch, num_frames, groups, d_state)),
        "D": (D, (heads,)),
        "initial_state": (initial_state, (batch, heads, head_dim, d_state)),
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
    check_lengths(lengths, batch, num_frames)
    if values_are_checked():
        check_signs(dt, A, lengths)


def check_signs(dt: Tensor, A: Tensor, lengths: Tensor | None = None) -> None:
    """Raise ValueError unless A < 0, and dt (B, T, ...) > 0 on every valid frame; waits for the device.

    Example
    -------
    >>> import torch
    >>> check_signs(torch.ones(1, 3, 2), torch.ones(2))
    Traceback (most recent call last):
    ...
    ValueError: A: expected values below 0 (decays in (0, 1)), got up to 1.0
    """
    if A.numel() and not (A < 0).all():
        raise ValueError(f"A: expected values below 0 (decays in (0, 1)), got up to {A.max().item()}")
    if lengths is not None:
        dt = dt[valid_frames(lengths, dt.size(1))]
    if dt.numel() and not (dt > 0).all():
        raise ValueError(f"dt: expected values above 0, got down to {dt.min().item()}. softplus makes them so")
