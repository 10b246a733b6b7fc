"""What the Triton kernels of SSD can run: looked at by ``auto`` before triton itself is imported."""

from cald_speech.ops.backends import Request, why_not_triton

MAX_PART = 64
MAX_STATE = 128


def head_parts(head_dim: int, largest: int = MAX_PART) -> int | None:
    """Into how many equal parts a head is cut so that none exceeds ``largest``; None where parts were under 16.

    A head of size P is the same as k heads of size P / k with its dt, A, B and C: rows of a state do not mix.

    Example
    -------
    >>> head_parts(64), head_parts(128), head_parts(80), head_parts(67)
    (1, 2, 2, None)
    """
    if head_dim <= largest:
        return 1
    return next((k for k in range(2, head_dim // 16 + 1) if head_dim % k == 0 and head_dim // k <= largest), None)


def why_not_triton_ssd(request: Request) -> str | None:
    """Why the SSD kernels cannot run a request, with the way out, or None where they can.

    Example
    -------
    >>> import torch
    >>> why_not_triton_ssd(Request(torch.device("cpu"), torch.float64)) is None
    False
    """
    if reason := why_not_triton(request):
        return reason
    head_dim, d_state = request.sizes.get("head_dim", 1), request.sizes.get("d_state", 1)
    if head_parts(head_dim) is None or d_state > MAX_STATE:
        return (
            f"its kernels take a head_dim up to {MAX_PART}, or one that splits into equal parts of 16 to {MAX_PART}, "
            f"and a d_state up to {MAX_STATE}; got head_dim {head_dim} and d_state {d_state}. Choose sizes within "
            "these limits or pass backend='torch'."
        )
    return None
