"""The least that an SSD scan must move and compute, whatever does it: the limit that a benchmark measures against."""


def bytes_moved(
    batch: int,
    num_frames: int,
    heads: int,
    head_dim: int,
    groups: int,
    d_state: int,
    dtype_bytes: int,
    *,
    bidirectional: bool = False,
    backward: bool = False,
) -> int:
    """Every input read once and every output written once; dt and its gradient are float32. Intermediates do not count.

    Arguments
    ---------
    batch, num_frames, heads, head_dim, groups, d_state : sizes of x (B, T, H, P) and B (B, T, G, N).
    dtype_bytes : bytes of one element of x, B and C.
    bidirectional : both directions in one call: a second dt, but x, B, C and y only once.
    backward : the backward pass alone (x, dt, B, C and dy in, four gradients out) instead of the forward pass.

    Example
    -------
    >>> bytes_moved(8, 3000, 16, 64, 1, 64, 2, bidirectional=True) / 1e6  # in MB: twice 49 for x and y, 6 for B and C
    107.52
    """
    frames = batch * num_frames
    inputs = frames * heads * head_dim * dtype_bytes
    maps = 2 * frames * groups * d_state * dtype_bytes
    steps = 4 * frames * heads * (1 + bidirectional)
    return 3 * inputs + 2 * maps + 2 * steps if backward else 2 * inputs + maps + steps


def flops(
    batch: int,
    num_frames: int,
    heads: int,
    head_dim: int,
    groups: int,
    d_state: int,
    *,
    chunk: int = 64,
    bidirectional: bool = False,
    backward: bool = False,
) -> int:
    """Additions and multiplications of the matrix products of the scan in chunks.

    Within a chunk: C B^T for each group, and its decayed form times x for each head; of these (chunk, chunk) matrices
    a single direction needs half. Across chunks, for each direction: what frames add to the state and read from it.
    ``backward`` counts the backward pass alone: two products for each of the forward pass. Work done again to save
    memory is not counted. ``chunk`` is the frames of a chunk; for the other arguments see :func:`bytes_moved`.

    Example
    -------
    >>> flops(8, 3000, 16, 64, 1, 64, bidirectional=True) / 1e9  # in GFLOP
    15.925248
    """
    width = chunk if bidirectional else chunk // 2
    within = width * (groups * d_state + heads * head_dim)
    across = 2 * (1 + bidirectional) * heads * head_dim * d_state
    return 2 * batch * num_frames * (within + across) * (1 + backward)
