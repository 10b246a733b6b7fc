"""Calibration: the regression against sums over the frames themselves, and when it keeps its hands off a slot."""

import copy
from functools import partial

import pytest
import torch

from cald_speech.conversion import LayerMap, convert
from cald_speech.distillation.calibration import Moments, Slot
from cald_speech.errors import UserError
from cald_speech.evaluation.calibration import calibrate
from cald_speech.mixers import Bidirectional, Mixer, WindowedAttention
from tests.helpers import SPEECH, relative_error, tiny_model

WIDTH = 16


def seen(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features with a column of ones, and targets that they explain in part."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    features = torch.cat([draw(count, 5) + 1.0, torch.ones(count, 1, dtype=torch.float64)], dim=1)
    true = torch.arange(18, dtype=torch.float64).view(6, 3) / 10
    return features, features @ true + 0.3 * draw(count, 3)


def moments_of(features: torch.Tensor, targets: torch.Tensor) -> Moments:
    moments = Moments()
    for frames in torch.arange(len(features)).split(7):  # as batches come
        moments.add(features[frames], targets[frames])
    return moments


def test_errors_and_norms_are_those_of_the_frames():
    features, targets = seen(50)
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moments = moments_of(features[:20], targets[:20]) + moments_of(features[20:], targets[20:])
    spread = (targets - targets.mean(0)).square().sum()
    assert moments.error(weight) == pytest.approx(((features @ weight - targets).square().sum() / spread).item())
    assert moments.ratio(weight) == pytest.approx(((features @ weight).norm() / targets.norm()).item())
    mean = torch.zeros(6, 3, dtype=torch.float64)
    mean[-1] = targets.mean(0)
    assert moments.error(mean) == pytest.approx(1.0)


def test_a_ridge_goes_from_the_prior_to_least_squares():
    features, targets = seen(50)
    prior, moments = torch.ones(6, 3, dtype=torch.float64), moments_of(features, targets)
    least_squares = torch.linalg.lstsq(features, targets).solution
    assert relative_error(moments.ridge(prior, 1e-9, ones=True), least_squares) < 1e-4
    for strength in (1e9, torch.inf):
        drawn = moments.ridge(prior, strength, ones=True)
        assert relative_error(drawn[:-1], prior[:-1]) < 1e-4
        assert relative_error(drawn[-1], (targets - features[:, :-1] @ prior[:-1]).mean(0)) < 1e-4
    distances = [(moments.ridge(prior, s, ones=True)[:-1] - prior[:-1]).norm() for s in (10.0, 1.0, 0.1)]
    assert distances == sorted(distances)


def test_a_scale_is_that_of_one_unknown():
    features, targets = seen(50)
    weight = torch.ones(6, 3, dtype=torch.float64)
    made = features[:, :-1] @ weight[:-1]
    centred = made - made.mean(0)
    expected = (centred * (targets - targets.mean(0))).sum() / centred.square().sum()
    assert moments_of(features, targets).scale(weight, ones=True) == pytest.approx(expected.item())


class Linear(Mixer):
    """A mixer that could be the attention, but for its output projection."""

    def __init__(self, out_proj: torch.nn.Linear):
        super().__init__()
        self.out_proj = out_proj

    def forward(self, x, lengths=None):
        return self.out_proj(x)


def slot(*, sets: int, frames: int, spoilt: float = 1.0) -> tuple[Slot, torch.nn.Linear]:
    torch.manual_seed(0)
    true = torch.nn.Linear(WIDTH, WIDTH)
    mixer = Linear(copy.deepcopy(true))
    with torch.no_grad():
        mixer.out_proj.weight.add_(spoilt * torch.randn(WIDTH, WIDTH) / 4)
        made = Slot.of(0, mixer, started=True)
        for number in range(sets):
            x = torch.randn(1, frames, WIDTH)
            valid = torch.ones(1, frames, dtype=torch.bool)
            made.see(x, true(x), valid, torch.tensor([frames]), [number % 3])
    return made, true


def test_what_can_be_explained_is():
    made, true = slot(sets=6, frames=40)
    fit = made.fit()
    assert fit.error[0] > 0.3 and fit.error[1] < 1e-3 and fit.changed == "projection"
    assert fit.norm[1] == pytest.approx(1.0, abs=0.01)
    assert relative_error(made.mixer.out_proj.weight, true.weight) < 0.05


def test_a_slot_that_nothing_helps_is_left_to_the_bit():
    made, true = slot(sets=6, frames=40, spoilt=0.0)
    fit = made.fit()
    assert fit.changed.startswith("as it was") and fit.error[0] == fit.error[1] < 1e-9
    assert torch.equal(made.mixer.out_proj.weight, true.weight)


def test_fewer_frames_than_unknowns_set_the_scale_alone_and_say_so():
    made, true = slot(sets=6, frames=8, spoilt=0.0)
    with torch.no_grad():
        made.mixer.out_proj.weight.mul_(3)
    made.moments = [Moments() for _ in made.moments]
    for number in range(3):
        x = torch.randn(1, 8, WIDTH)
        made.see(x, true(x).detach(), torch.ones(1, 8, dtype=torch.bool), torch.tensor([8]), [number])
    fit = made.fit()
    assert fit.changed == "scale (no projection: 8 frames for 17 unknowns)"
    assert relative_error(made.mixer.out_proj.weight, true.weight) < 0.05


def test_padding_does_not_count():
    made, true = slot(sets=0, frames=1)
    x = torch.randn(2, 30, WIDTH)
    valid = torch.arange(30) < torch.tensor([[30], [11]])
    alone = slot(sets=0, frames=1)[0]
    with torch.no_grad():
        target = true(x)
        target[1, 11:] = torch.nan
        made.see(x, target, valid, torch.tensor([30, 11]), [0, 0])
        alone.see(x[:1], target[:1], valid[:1], torch.tensor([30]), [0])
        alone.see(x[1:, :11], target[1:, :11], valid[1:, :11], torch.tensor([11]), [0])
    assert torch.allclose(made.moments[0].cross, alone.moments[0].cross)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad):
    made, true = slot(sets=0, frames=1)
    x = torch.randn(1, 30, WIDTH)
    x[0, 3, 2] = bad
    with pytest.raises(UserError, match="layer 0 makes of the audio is not finite"):
        made.see(x, true(x).detach(), torch.ones(1, 30, dtype=torch.bool), torch.tensor([30]), [0])


def test_audio_that_attention_does_nothing_with_is_refused():
    made, _ = slot(sets=0, frames=1)
    for part in range(3):
        x = torch.randn(1, 30, WIDTH)
        made.see(x, torch.ones(1, 30, WIDTH), torch.ones(1, 30, dtype=torch.bool), torch.tensor([30]), [part])
    with pytest.raises(UserError, match="the same for all frames of the audio"):
        made.fit()


class NoStart(Mixer):
    def __init__(self, d_model: int, num_heads: int = 1):
        super().__init__()
        self.out_proj = torch.nn.Linear(d_model, d_model)

    def forward(self, x, lengths=None):
        return self.out_proj(x)


class NoProjection(WindowedAttention):
    def output_projections(self):
        return ()


@pytest.mark.parametrize(
    ("factory", "initialise", "told"),
    [
        (NoStart, "attention", "NoStart in layer 0 has no such start"),
        (Bidirectional, "random", "Bidirectional in layer 0 has no such start"),
        (NoProjection, "attention", "NoProjection in layer 0 names no output projection"),
        (None, "attention", "expected a layer_map that converts a layer"),
    ],
)
def test_mixers_that_cannot_be_calibrated_are_named(factory, initialise, told):
    teacher = tiny_model(SPEECH["wav2vec2"])
    student = copy.deepcopy(teacher)
    report = convert(student, LayerMap(factory), initialise=initialise)
    with pytest.raises(UserError, match=told):
        calibrate(report, teacher, student, [])
