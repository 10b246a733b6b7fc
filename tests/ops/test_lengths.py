"""Lengths: what is refused, which frames are valid, what is written over padding."""

import pytest
import torch

from cald_speech.ops import check_lengths, mask_padding, valid_frames


@pytest.mark.parametrize("lengths", [None, torch.tensor([0, 5]), torch.tensor([3, 5], dtype=torch.int32)])
def test_good_lengths_pass(lengths):
    check_lengths(lengths, batch=2, num_frames=5)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(torch.tensor([3]), id="another batch size"),
        pytest.param(torch.tensor([[3, 5]]), id="two axes"),
        pytest.param(torch.tensor([0.5, 1.0]), id="relative lengths"),
        pytest.param(torch.tensor([True, False]), id="booleans"),
        pytest.param(torch.tensor([3, 6]), id="longer than the batch"),
        pytest.param(torch.tensor([-1, 5]), id="negative"),
    ],
)
def test_bad_lengths_are_named(lengths):
    with pytest.raises(ValueError, match=r"lengths: expected"):
        check_lengths(lengths, batch=2, num_frames=5)


def test_valid_frames():
    expected = [[False, False, False], [True, True, False], [True, True, True]]
    assert valid_frames(torch.tensor([0, 2, 3]), 3).tolist() == expected


@pytest.mark.parametrize("axes", [(), (4,), (2, 3)], ids=["B T", "B T D", "B T H P"])
def test_mask_padding_writes_zeros_over_anything(axes):
    x = torch.randn(2, 5, *axes)
    x[0, 3:] = torch.nan
    x[1, 1:] = torch.inf
    x.requires_grad_()
    y = mask_padding(x, torch.tensor([3, 1]))
    assert torch.equal(y[0, :3], x[0, :3]) and torch.equal(y[1, :1], x[1, :1])
    assert not y[0, 3:].any() and not y[1, 1:].any()
    y.square().sum().backward()
    assert x.grad.isfinite().all() and not x.grad[0, 3:].any() and not x.grad[1, 1:].any()


def test_no_lengths_no_masking():
    x = torch.randn(2, 3)
    assert mask_padding(x, None) is x
