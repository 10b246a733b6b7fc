"""Which parameters decay, and that every one is in exactly one group."""

from functools import partial

import pytest
import torch

from cald_speech import LayerMap, convert
from cald_speech.mixers import Bidirectional
from cald_speech.training.optimiser import parameter_groups, step_if_finite
from tests.helpers import SPEECH, SPEECH_CASES, tiny_model

FAMILIES = SPEECH


@pytest.fixture(params=SPEECH_CASES)
def model(request):
    model = tiny_model(request.param, mask_time_prob=0.1)
    convert(model, LayerMap(partial(Bidirectional, share_projections=True), {1: None}))
    model.freeze_feature_encoder()
    return model


def names_by_decay(model, weight_decay=0.1):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay)
    assert [group["weight_decay"] for group in groups] == [weight_decay, 0.0]
    return [[names[id(p)] for p in group["params"]] for group in groups]


def test_every_trainable_parameter_once(model):
    decayed, plain = names_by_decay(model)
    assert sorted(decayed + plain) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert not any("feature_extractor" in name for name in decayed + plain)


@pytest.mark.parametrize("ending", ["A_log", "dt_bias", ".D", ".bias", "layer_norm.weight", "masked_spec_embed"])
def test_kept_from_decay(model, ending):
    decayed, plain = names_by_decay(model)
    assert any(name.endswith(ending) for name in plain)
    assert not any(name.endswith(ending) for name in decayed)


def test_matrices_decay(model):
    decayed, _ = names_by_decay(model)
    assert {"lm_head.weight"} < set(decayed) and any("mixer" in name for name in decayed)
    assert all(model.get_parameter(name).dim() >= 2 for name in decayed)


def one_step(gradient: float, max_norm: float, **options) -> tuple[float, bool, torch.Tensor]:
    """Norm, whether the step was taken, and what it changed, of seven weights in two groups with equal gradients."""
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4)]
    for p in parameters:
        p.grad = torch.full_like(p, gradient)
    optimiser = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
    norm, taken = step_if_finite(optimiser, torch.amp.GradScaler("cpu", enabled=False), max_norm, **options)
    assert all(p.grad is None for p in parameters)
    return norm, taken, torch.cat([p.detach() for p in parameters])


@pytest.mark.parametrize("max_norm", [0.5, 10.0])
def test_clipping_is_joint(max_norm):
    norm, taken, moved = one_step(1.0, max_norm)
    assert norm == pytest.approx(7**0.5) and taken
    assert moved.norm().item() == pytest.approx(min(norm, max_norm), rel=1e-4)


@pytest.mark.parametrize("gradient, others", [(float("nan"), True), (float("inf"), True), (1.0, False)])
def test_a_step_that_may_not_be_taken(gradient, others):
    _, taken, moved = one_step(gradient, 1.0, others=lambda: others)
    assert not taken and not moved.any()


def test_decay_of_the_mixers_alone(model):
    decayed = {id(p) for p in parameter_groups(model, 0.1, decay="mixers")[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names and all(".mixer." in name for name in names)
    everywhere = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    assert decayed < everywhere
