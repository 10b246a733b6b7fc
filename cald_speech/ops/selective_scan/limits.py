"""What the Triton kernels of the selective scan can run; imports no Triton, so that asking costs nothing."""

from cald_speech.ops.backends import Request, why_not_triton

# One program holds some frames' (channels, d_state) in registers: beyond this they spill.
MAX_D_STATE = 256


def why_not_selective_scan_triton(request: Request) -> str | None:
    """The reason that the kernels cannot run a request, or None.

    Example
    -------
    >>> import torch
    >>> why_not_selective_scan_triton(Request(torch.device("cpu"), torch.float64, {"d_state": 16})) is None
    False
    """
    if reason := why_not_triton(request):
        return reason
    if request.sizes.get("d_state", 1) > MAX_D_STATE:
        return f"its kernels go to d_state {MAX_D_STATE}, got {request.sizes['d_state']}: pass backend='torch'."
    return None
