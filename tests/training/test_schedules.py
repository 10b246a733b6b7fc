"""Learning rates: up over the warm-up, down to the floor, and no state."""

from itertools import pairwise

import pytest

from cald_speech.training.schedules import SHAPES, WarmupSchedule

every_shape = pytest.mark.parametrize("shape", SHAPES)


def schedule(shape: str) -> WarmupSchedule:
    return WarmupSchedule(warmup_steps=10, decay_steps=40, shape=shape, floor=0.1)


@every_shape
def test_warm_up_is_linear_and_never_zero(shape):
    factors = [schedule(shape)(step) for step in range(11)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]) and factors[10] == 1


@every_shape
def test_decay_goes_down_to_the_floor_and_stays(shape):
    factors = [schedule(shape)(step) for step in range(10, 80)]
    assert all(one >= other for one, other in pairwise(factors))
    assert factors[40:] == pytest.approx([1.0 if shape == "constant" else 0.1] * 30)


@pytest.mark.parametrize(
    ("shape", "middle"), [("constant", 1), ("linear", 0.55), ("cosine", 0.55), ("exponential", 0.1**0.5)]
)
def test_middle(shape, middle):
    assert schedule(shape)(30) == pytest.approx(middle)


@every_shape
def test_no_warm_up_and_no_decay(shape):
    plain = WarmupSchedule(warmup_steps=0, decay_steps=0, shape=shape, floor=0.5)
    assert plain(0) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "zigzag"}, "expected one of constant, linear, cosine, clamped_cosine, exponential, got 'zigzag'"),
        ({"shape": "exponential", "floor": 0.0}, r"floor in \(0, 1\], got 0"),
    ],
    ids=["shape", "floor"],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupSchedule(**options)
