"""Hydra against its quasiseparable matrix, written out entry by entry in float64."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from cald_speech.mixers import Hydra
from tests.helpers import padded_batch, relative_error

WIDTH, HEADS = 16, 4
FRAMES = 12
# The step sizes and decay rates are float32 numbers in either computation; what remains is their rounding.
EXACT = 1e-6


def quasiseparable(past, future, rates, delta, B, C) -> torch.Tensor:
    """One head's matrix (T, T) from its step sizes (T,), decay rates (2,), delta (T,), B and C (T, N)."""
    decays = (past * rates[0]).exp(), (future * rates[1]).exp()
    matrix = torch.zeros(len(delta), len(delta), dtype=torch.float64)
    for i in range(len(delta)):
        matrix[i, i] = delta[i]
        for j in range(i):
            matrix[i, j] = decays[0][j + 1 : i + 1].prod() * past[j] * (C[i] @ B[j])
        for j in range(i + 1, len(delta)):
            matrix[i, j] = decays[1][i:j].prod() * future[j] * (C[i] @ B[j])
    return matrix


@torch.no_grad()
def by_matrices(mixer: Hydra, x: torch.Tensor) -> torch.Tensor:
    """The mixer's output for one sequence (T, D): a matrix for each head, then gate, norm and output projection."""
    heads, _, _, groups = mixer.heads
    (xBC, per_head), gate = mixer.project(x[None])
    v, B, C = (part[0] for part in mixer.scan.split(xBC))
    past, future, delta = per_head[0].chunk(3, dim=-1)
    past = F.softplus(past.float() + mixer.scan.dt_bias).double()
    future = F.softplus(future.float() + mixer.backward_scan.dt_bias).double()
    rates = -torch.stack([mixer.scan.A_log, mixer.backward_scan.A_log]).exp().double()
    y = torch.empty_like(v)
    for head in range(heads):
        group = head * groups // heads
        values = past[:, head], future[:, head], rates[:, head], delta[:, head] + mixer.scan.D[head]
        y[:, head] = quasiseparable(*values, B[:, group], C[:, group]) @ v[:, head]
    normed = F.rms_norm(y.flatten(1), mixer.norm.weight.shape, mixer.norm.weight, eps=1e-5)
    return mixer.out_proj(normed * F.silu(gate[0]))


@pytest.mark.parametrize(
    "factory",
    [Hydra, partial(Hydra, head_dim=8, d_state=3, n_groups=1), partial(Hydra, expand=2, n_groups=2)],
    ids=["a group per head", "one group", "expanded"],
)
@torch.no_grad()
def test_is_the_quasiseparable_matrix(factory):
    mixer = factory(WIDTH, HEADS, dt_range=(0.05, 0.5), A_range=(0.5, 4.0)).double()
    mixer.norm.weight.uniform_(0.5, 2.0)
    x, lengths = padded_batch((FRAMES, FRAMES - 5), WIDTH)
    x = x.double()
    y = mixer(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert relative_error(y[row, :length], by_matrices(mixer, x[row, :length])) <= EXACT


@torch.no_grad()
def test_the_diagonal_is_of_the_input_and_does_not_count_the_scans():
    """One frame has no past and no future: what it puts out is (delta + D) x, whatever B and C are."""
    mixer = Hydra(WIDTH, HEADS)
    x = torch.randn(1, 1, WIDTH)
    (xBC, per_head), gate = mixer.project(x)
    delta = per_head.chunk(3, dim=-1)[2]
    v = mixer.scan.split(xBC)[0] * (delta + mixer.scan.D)[..., None]
    assert relative_error(mixer(x), mixer.finish(v.flatten(2), gate)) <= EXACT
    other = mixer(x)
    mixer.in_proj.weight[2 * WIDTH : 4 * WIDTH].normal_()  # B and C
    assert relative_error(mixer(x), other) <= EXACT


@torch.no_grad()
def test_every_frame_sees_every_other():
    mixer = Hydra(WIDTH, HEADS)
    x, _ = padded_batch((20,), WIDTH)
    changed = x.clone()
    changed[:, 8] += 1.0
    assert (mixer(x) - mixer(changed)).abs().sum(-1).all()
