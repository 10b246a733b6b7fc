"""The selective scan's compiled kernels: strips, threads, offsets; the rest as of the other backends."""

import pytest
import torch

from cald_speech.ops import selective_scan
from tests.helpers import TOLERANCE, needs_native, relative_error
from tests.ops.test_selective_scan import make_inputs, run_with_gradients

pytestmark = needs_native


def assert_same(actual, expected):
    errors = {name: relative_error(actual[name].detach(), expected[name].detach()) for name in expected}
    assert max(errors.values()) <= TOLERANCE["parity"], errors


@pytest.mark.parametrize(
    ("channels", "groups", "d_state"), [(1, 1, 1), (64, 1, 16), (200, 1, 3), (130, 2, 16), (5, 5, 300)]
)
def test_every_size(channels, groups, d_state):
    """Whole strips and part of one, in every group; blocks of 64 frames and, for large states, of 16."""
    inputs = make_inputs(130, batch=1, channels=channels, groups=groups, d_state=d_state)
    assert_same(run_with_gradients(inputs, backend="native"), run_with_gradients(inputs, backend="torch"))


@pytest.mark.parametrize("channels", [64, 200])
def test_any_number_of_threads(channels):
    """A group's strips are parted by it: shares of unequal size, and their sums for B and C."""
    inputs, found = make_inputs(70, batch=1, channels=channels, groups=1), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run_with_gradients(inputs, backend="native"))
            again = run_with_gradients(inputs, backend="native")
            assert all(torch.equal(found[-1][name], again[name]) for name in again), "the same call, other bits"
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D"])
def test_nothing_hides_a_nan(name):
    inputs = make_inputs(40)
    inputs[name].view(-1)[0] = torch.nan
    expected = selective_scan(**inputs, backend="naive").isnan()
    assert expected.any() and torch.equal(selective_scan(**inputs, backend="native").isnan(), expected)


def test_offsets_past_two_to_the_31():
    """Sequences 2^31 elements apart, in memory that is only touched where they lie."""
    inputs, apart = make_inputs(20, batch=2), 2**31 + 8
    x = inputs["x"]
    far = torch.empty(apart + x[0].numel()).as_strided(x.shape, (apart, x.size(2), 1)).copy_(x)
    assert torch.equal(
        selective_scan(**inputs | {"x": far}, backend="native"), selective_scan(**inputs, backend="native")
    )
