"""Causal depthwise convolution with SiLU, the short filter in front of the scans of the Mamba family."""

from torch import Tensor

from cald_speech.ops.arguments import check_lengths_of, check_tensors, check_x
from cald_speech.ops.backends import (
    Backend,
    Request,
    check_is_tensor,
    device_of,
    run_op,
    why_not_native,
    why_not_torch,
    why_not_triton,
)

ACTIVATIONS = ("silu", "identity")
# Of the Triton kernels, whose backward pass writes out K times K loads for each frame.
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


# Fastest first: ``auto`` takes the first that can run.
BACKENDS = {
    "triton": Backend("cald_speech.ops.short_conv.triton", why_not_short_conv_triton, auto_on=("cuda",)),
    "native": Backend("cald_speech.ops.short_conv.native", why_not_native, auto_on=("cpu",)),
    "torch": Backend("cald_speech.ops.short_conv.torch_blocked", why_not_torch),
    "naive": Backend("cald_speech.ops.short_conv.naive", differentiable_forwards=True),
}


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Filter every channel with its own K taps over the present and the K-1 frames before it in the scan.

    Arguments
    ---------
    x : (B, T, D) float tensor.
    weight : (D, K); ``weight[:, -1]`` weighs the present frame.
    bias : (D,) or None.
    lengths : (B,) integers in [0, T], valid frames; padded frames count as silence and come out as zeros.
    reverse : True runs from each sequence's last valid frame to its first: the filter looks ahead in time.
    initial_state : (B, D, K-1), the K-1 inputs before the scan's first frame, in the order of the scan.
    return_final_state : True returns the last K-1 inputs of the scan too: the next piece's ``initial_state``.
    activation : ``silu`` or ``identity``, applied to the sum.
    backend : ``auto``, ``triton``, ``native``, ``torch`` or ``naive``.

    Returns
    -------
    y (B, T, D) in x's dtype; with ``return_final_state`` also the state (B, D, K-1).

    Raises
    ------
    ValueError
        names the argument that does not fit, what was expected and what came.

    Example
    -------
    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1)
    >>> taps = torch.tensor([[10.0, 1.0]])
    >>> short_conv(x, taps, activation="identity").flatten().tolist()
    [1.0, 12.0, 23.0]
    >>> short_conv(x, taps, activation="identity", reverse=True).flatten().tolist()
    [21.0, 32.0, 3.0]
    """
    check_is_tensor("x", x)
    check_is_tensor("weight", weight)
    check_x(x, "(B, T, D)")
    batch, _, channels = x.shape
    if weight.dim() != 2 or weight.size(0) != channels or weight.size(1) < 1:
        raise ValueError(f"weight: expected ({channels}, K) to go with x, got {tuple(weight.shape)}")
    state = (batch, channels, weight.size(1) - 1)
    parameters = {"weight": (weight, tuple(weight.shape)), "bias": (bias, (channels,))}
    check_tensors(x, parameters | {"initial_state": (initial_state, state)})
    check_lengths_of(x, lengths)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    options = {"lengths": lengths, "reverse": reverse, "activation": activation}
    options |= {"initial_state": initial_state, "return_final_state": return_final_state}
    request = lambda: Request(device_of(x), x.dtype, {"width": weight.size(1), "elements": x.numel()})  # noqa: E731
    return run_op("short_conv", backend, BACKENDS, request, x, weight, bias, **options)
