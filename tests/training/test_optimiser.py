"""Which parameters decay, and that every one is in exactly one group."""

from functools import partial

import pytest
import torch

from cald_speech import LayerMap, convert
from cald_speech.mixers import Bidirectional
from cald_speech.training.optimiser import clip_gradients, parameter_groups
from tests.helpers import SPEECH, tiny_model

FAMILIES = SPEECH


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
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


def test_clipping_is_joint():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimiser = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
    assert clip_gradients(optimiser, 0.5).item() == pytest.approx(7**0.5)
    assert torch.cat([p.grad for p in parameters]).norm().item() == pytest.approx(0.5, rel=1e-4)
    clip_gradients(optimiser, 10.0)
    assert torch.cat([p.grad for p in parameters]).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_decay_of_the_mixers_alone(model):
    decayed = {id(p) for p in parameter_groups(model, 0.1, decay="mixers")[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names and all(".mixer." in name for name in names)
    everywhere = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    assert decayed < everywhere
