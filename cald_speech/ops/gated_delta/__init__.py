"""The gated delta rule (Yang et al., Gated DeltaNet, arXiv 2412.06464): a state that forgets and corrects itself.

Linear attention adds ``v_t k_t^T`` to its state; the delta rule adds what the state does not answer yet when it is
asked for k_t, ``beta_t (v_t - S k_t) k_t^T``, so that a key written again is overwritten and not summed. Before that
the state decays: by a number for each head (gated DeltaNet), or by one for each channel of the keys (Kimi Delta
Attention, arXiv 2510.26692).
"""

from torch import Tensor

from cald_speech.ops.arguments import check_chunk_size, check_lengths_of, check_tensors, check_x
from cald_speech.ops.backends import (
    Backend,
    Request,
    check_is_tensor,
    device_of,
    run_op,
    values_are_checked,
    values_can_be_seen,
    why_not_native,
    why_not_torch,
    why_not_triton,
)
from cald_speech.ops.lengths import valid_frames

# Of the Triton kernels: the largest state.
MAX_STATE = 128


def why_not_triton_gated_delta(request: Request) -> str | None:
    """Why the kernels cannot run a request, with the way out, or None where they can.

    Example
    -------
    >>> import torch
    >>> why_not_triton_gated_delta(Request(torch.device("cpu"), torch.float64)) is None
    False
    """
    if reason := why_not_triton(request):
        return reason
    if (d_state := request.sizes.get("d_state", 1)) > MAX_STATE:
        return f"its kernels go to d_state {MAX_STATE}, got {d_state}: pass backend='torch'."
    return None


# Fastest first: ``auto`` takes the first that can run.
BACKENDS = {
    "triton": Backend("cald_speech.ops.gated_delta.triton", why_not_triton_gated_delta, auto_on=("cuda",)),
    "native": Backend("cald_speech.ops.gated_delta.native", why_not_native, auto_on=("cpu",)),
    "torch": Backend("cald_speech.ops.gated_delta.torch_chunked", why_not_torch),
    "naive": Backend("cald_speech.ops.gated_delta.naive", differentiable_forwards=True),
}


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan ``S_t = S_{t-1} Diag(exp g_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T``, ``y_t = S_t q_t``, for each head.

    Arguments
    ---------
    q, k : (B, T, G, N) float tensors, queries and keys, G dividing H; head h reads group ``h // (H / G)``. They are
        taken as they come: neither scaled nor normed. The state stays bounded where ``beta_t |k_t|^2`` is in [0, 2], so
        keys are to have length 1, or less.
    v : (B, T, H, P) values; float32, bfloat16, float16 or float64.
    beta : (B, T, H) write strengths: 0 leaves the state alone, 1 replaces what it holds for k_t. Values up to 2, which
        turn that round (negative eigenvalues, arXiv 2411.12537), are computed like any other. Outside [0, 2] they are
        refused with ``CALD_SPEECH_DEBUG=1`` alone, since looking costs a device sync.
    g : log decays <= 0, (B, T, H) or, for each channel of the keys, (B, T, H, N); -inf forgets all. Checked in the same
        mode.
    lengths : (B,) integers in [0, T], valid frames of each right-padded sequence. Padded frames are never read, and
        come out as zeros. None: all are valid.
    reverse : True scans every sequence from its last valid frame to its first.
    initial_state : (B, H, P, N), the state before the first frame of the scan; zeros if None.
    return_final_state : True returns the state after the last frame of the scan too.
    chunk_size : frames handled by one matrix product, None for the backend's best; it changes speed, not the result.
    backend : ``auto``, ``triton``, ``native``, ``torch`` or ``naive``.

    Returns
    -------
    y (B, T, H, P) in v's dtype; with ``return_final_state`` also the state (B, H, P, N), float32 (float64 for
    float64 values). All arithmetic on decays is float32 or better, under autocast too; the
    ``triton`` backend multiplies bfloat16 inputs in bfloat16.

    Raises
    ------
    ValueError
        names the argument whose shape, dtype or values do not fit, what was expected and what came.

    Example
    -------
    >>> import torch
    >>> key, none = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1)
    >>> v = torch.tensor([4.0, 8.0, 6.0]).view(1, 3, 1, 1)
    >>> gated_delta(key, key, v, torch.ones(1, 3, 1), none).flatten().tolist()  # each value replaces the one before
    [4.0, 8.0, 6.0]
    >>> gated_delta(key, key, v, torch.full((1, 3, 1), 0.5), none).flatten().tolist()  # or half of it
    [2.0, 5.0, 5.5]
    """
    check(q, k, v, beta, g, lengths=lengths, initial_state=initial_state, chunk_size=chunk_size)
    options = {"lengths": lengths, "reverse": reverse, "chunk_size": chunk_size}
    options |= {"initial_state": initial_state, "return_final_state": return_final_state}
    return run_op("gated_delta", backend, BACKENDS, lambda: request_of(k, v, g), q, k, v, beta, g, **options)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
) -> None:
    """Raise ValueError where the arguments do not fit the values v; in debug mode where g or beta have a wrong sign."""
    for name, tensor in {"q": q, "k": k, "v": v, "beta": beta, "g": g}.items():
        check_is_tensor(name, tensor)
    check_x(v, "(B, T, H, P)", name="v")
    if k.dim() != 4 or k.size(3) < 1:
        raise ValueError(f"k: expected (B, T, G, N) and a state of at least 1, got shape {tuple(k.shape)}")
    batch, num_frames, heads, head_dim = v.shape
    groups, d_state = k.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"k: expected a number of groups that divides the {heads} heads, got {groups}")
    expected = {
        "k": (k, (batch, num_frames, groups, d_state)),
        "q": (q, (batch, num_frames, groups, d_state)),
        "beta": (beta, (batch, num_frames, heads)),
        "g": (g, (batch, num_frames, heads, d_state) if g.dim() == 4 else (batch, num_frames, heads)),
        "initial_state": (initial_state, (batch, heads, head_dim, d_state)),
    }
    check_tensors(v, expected, of="v")
    check_lengths_of(v, lengths, of="v")
    check_chunk_size(chunk_size)
    if values_can_be_seen(v) and values_are_checked():
        check_strengths(beta, g, lengths)


def check_strengths(beta: Tensor, g: Tensor, lengths: Tensor | None = None) -> None:
    """Raise ValueError unless beta is in [0, 2] and g <= 0 on every valid frame; waits for the device.

    Example
    -------
    >>> import torch
    >>> check_strengths(torch.ones(1, 3, 2), torch.ones(1, 3, 2))
    Traceback (most recent call last):
    ...
    ValueError: g: expected log decays of at most 0, got up to 1.0
    """
    if lengths is not None:
        valid = valid_frames(lengths.to(beta.device), beta.size(1))
        beta, g = beta[valid], g[valid]
    if beta.numel() and not ((beta >= 0) & (beta <= 2)).all():
        raise ValueError(
            f"beta: expected write strengths in [0, 2], got {beta.min().item()} to {beta.max().item()}. sigmoid makes "
            "them so"
        )
    if g.numel() and not (g <= 0).all():
        raise ValueError(f"g: expected log decays of at most 0, got up to {g.max().item()}")


def request_of(k: Tensor, v: Tensor, g: Tensor) -> Request:
    """What a backend is asked before it is chosen; ``g_dim`` is 4 where every channel of the keys has its decay."""
    elements = max(v.numel(), k.numel(), g.numel())
    sizes = {"head_dim": v.size(3), "d_state": k.size(3), "g_dim": g.dim(), "elements": elements}
    return Request(device_of(v), v.dtype, sizes)
