"""SSD in both directions at once equals the sum of a scan forwards and one in reverse, in outputs and gradients."""

import pytest
import torch
from torch.nn import functional as F

from cald_speech.ops import ssd, ssd_bidirectional
from tests.helpers import TOLERANCE, relative_error

HEADS, HEAD_DIM, D_STATE = 4, 3, 5


def make_inputs(num_frames, *, batch=3, groups=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    inputs = {
        "x": randn(batch, num_frames, HEADS, HEAD_DIM),
        "dt": F.softplus(randn(batch, num_frames, 2, HEADS) - 2),
        "A": -torch.rand(2, HEADS, generator=g).mul(3).exp() / 4,
        "B": randn(batch, num_frames, groups, D_STATE),
        "C": randn(batch, num_frames, groups, D_STATE),
        "D": randn(HEADS),
    }
    return {name: v.to(dtype) for name, v in inputs.items()}


def two_scans(x, dt, A, B, C, D=None, lengths=None):
    past = ssd(x, dt[:, :, 0], A[0], B, C, D, lengths=lengths, backend="naive")
    return past + ssd(x, dt[:, :, 1], A[1], B, C, lengths=lengths, reverse=True, backend="naive")


def with_gradients(function, inputs, **options):
    leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
    y = function(**leaves, **options)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {"y": y.detach()} | {f"gradient of {name}": v.grad for name, v in leaves.items()}


@pytest.mark.parametrize("groups", [1, 2, HEADS], ids=["one group", "two groups", "group per head"])
@pytest.mark.parametrize("num_frames", [1, 65, 130])
def test_equals_two_scans(num_frames, groups, ssd_backend):
    inputs = make_inputs(num_frames, groups=groups)
    for lengths in (None, torch.tensor([num_frames, num_frames // 2, 0])):
        expected = with_gradients(two_scans, inputs, lengths=lengths)
        actual = with_gradients(ssd_bidirectional, inputs, lengths=lengths, backend=ssd_backend)
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        assert all(error <= TOLERANCE["parity"] for error in errors.values()), errors


def test_without_a_direct_path(ssd_backend):
    inputs = make_inputs(33)
    del inputs["D"]
    assert relative_error(ssd_bidirectional(**inputs, backend=ssd_backend), two_scans(**inputs)) <= TOLERANCE["parity"]


def test_no_frames(ssd_backend):
    assert ssd_bidirectional(**make_inputs(0), backend=ssd_backend).shape == (3, 0, HEADS, HEAD_DIM)


@pytest.mark.parametrize(("name", "axis"), [("dt", 2), ("A", 0)])
def test_the_direction_axis_is_asked_for(name, axis):
    inputs = make_inputs(5)
    inputs[name] = inputs[name].select(axis, 0)
    with pytest.raises(ValueError, match=r"dt, A: expected a direction axis of 2"):
        ssd_bidirectional(**inputs)
