"""What the Triton kernels of the short convolution can run; imports no Triton, so that asking costs nothing."""

from cald_speech.ops.backends import Request, why_not_triton

# The backward pass writes out K times K loads for each frame.
MAX_WIDTH = 16


def why_not_short_conv_triton(request: Request) -> str | None:
    """The reason that the kernels cannot run a request, or None.

    Example
    -------
    >>> import torch
    >>> why_not_short_conv_triton(Request(torch.device("cpu"), torch.float64, {"width": 4})) is None
    False
    """
    if reason := why_not_triton(request):
        return reason
    if request.sizes.get("width", 1) > MAX_WIDTH:
        return f"its kernels go to {MAX_WIDTH} taps, got {request.sizes['width']}: pass backend='torch'."
    return None
