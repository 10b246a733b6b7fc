"""What the ops accept: one check of shapes, dtypes, devices and values for the arguments that they share."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cald_speech.ops.backends import check_is_tensor, device_of, values_are_checked, values_can_be_seen
from cald_speech.ops.lengths import check_lengths, valid_frames

# Others that torch calls floating have no arithmetic of their own.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    axes: str,
    unit: str,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
) -> None:
    """Raise ValueError where the arguments of a scan do not fit its x; in debug mode where dt or A have a wrong sign.

    Arguments
    ---------
    axes : those of x, such as ``(B, T, H, P)``: batch, frames, units and, where there is one, a unit's size.
    unit : what the third axis counts, in words. A decay rate belongs to a head, or to a channel's state entry.

    Example
    -------
    >>> import torch
    >>> x, B = torch.ones(1, 3, 4, 2), torch.ones(1, 3, 1, 5)
    >>> check_scan(x, torch.ones(1, 3, 4), -torch.ones(4), B, B, None, axes="(B, T, H, P)", unit="heads")
    """
    for name, v in {"x": x, "dt": dt, "A": A, "B": B, "C": C}.items():
        check_is_tensor(name, v)
    check_x(x, axes)
    if B.dim() != 4 or B.size(3) < 1:
        raise ValueError(f"B: expected (B, T, G, N) and a state of at least 1, got shape {tuple(B.shape)}")
    batch, num_frames, units, *size = x.shape
    groups, d_state = B.shape[2:]
    if groups == 0 or units % groups:
        raise ValueError(f"B: expected a number of groups that divides the {units} {unit}, got {groups}")
    expected = {
        "dt": (dt, (batch, num_frames, units)),
        "A": (A, (units,) if size else (units, d_state)),
        "B": (B, (batch, num_frames, groups, d_state)),
        "C": (C, (batch, num_frames, groups, d_state)),
        "D": (D, (units,)),
        "initial_state": (initial_state, (batch, units, *size, d_state)),
    }
    check_tensors(x, expected)
    check_lengths_of(x, lengths)
    check_chunk_size(chunk_size)
    if values_can_be_seen(x) and values_are_checked():
        check_signs(dt, A, lengths)


def check_x(x: Tensor, axes: str, name: str = "x") -> None:
    """Raise ValueError unless x has these axes and holds floats, of no sequences or frames at the least.

    Example
    -------
    >>> check_x(torch.ones(2, 0, 0), "(B, T, D)")
    Traceback (most recent call last):
    ...
    ValueError: x: expected a float tensor (B, T, D) of at least (0, 0, 1), got torch.float32 of shape (2, 0, 0)
    """
    least = (0, 0) + (1,) * (axes.count(",") - 1)
    if x.dim() != len(least) or x.dtype not in FLOATS or 0 in x.shape[2:]:
        raise ValueError(
            f"{name}: expected a float tensor {axes} of at least {least}, got {x.dtype} of shape {tuple(x.shape)}"
        )


def check_tensors(x: Tensor, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]], *, of: str = "x") -> None:
    """Raise ValueError unless every tensor that is given has its shape, holds floats and lies where x does.

    of : what the op calls x.

    Example
    -------
    >>> import torch
    >>> check_tensors(torch.ones(1, 3, 4), {"bias": (torch.ones(5), (4,))})
    Traceback (most recent call last):
    ...
    ValueError: bias: expected shape (4,) to go with x (1, 3, 4), got (5,)
    """
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        check_is_tensor(name, tensor)
        if tensor.shape != shape:
            given = tuple(tensor.shape)
            raise ValueError(f"{name}: expected shape {shape} to go with {of} {tuple(x.shape)}, got {given}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: expected a float tensor, got {tensor.dtype}")
        there = device_of(tensor)
        # With an x of FakeTensorMode no values are read, whether the others have some (a model's weights) or not.
        stand_in = isinstance(x, FakeTensor) and tensor.device == x.device
        if there != device_of(x) and not stand_in:
            raise ValueError(f"{name}: expected on {device_of(x)} like {of}, got {there}")


def check_lengths_of(x: Tensor, lengths: Tensor | None, *, of: str = "x") -> None:
    """Raise ValueError unless ``lengths`` fit x (B, T, ...), and lie where it does or on the CPU.

    of : what the op calls x.

    Example
    -------
    >>> import torch
    >>> check_lengths_of(torch.ones(2, 5, 4), torch.tensor([3, 5], device="meta"))
    Traceback (most recent call last):
    ...
    ValueError: lengths: expected on cpu like x, or on the CPU, got meta
    """
    check_lengths(lengths, x.size(0), x.size(1))
    if lengths is None:
        return
    if (there := device_of(lengths)) != device_of(x) and there.type != "cpu":
        raise ValueError(f"lengths: expected on {device_of(x)} like {of}, or on the CPU, got {there}")
    if device_of(x).type == "meta" and isinstance(x, FakeTensor) and not isinstance(lengths, FakeTensor):
        raise ValueError(f"lengths: expected of FakeTensorMode like {of}, got {type(lengths).__name__}")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise ValueError unless it is None or a whole number of at least 1: kernels step by it, and would never arrive.

    Example
    -------
    >>> check_chunk_size(-1)
    Traceback (most recent call last):
    ...
    ValueError: chunk_size: expected a whole number of at least 1, got -1
    """
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size is True or chunk_size < 1):
        raise ValueError(f"chunk_size: expected a whole number of at least 1, got {chunk_size!r}")


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
