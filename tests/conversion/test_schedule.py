"""The conversion schedule: which layers come when; and that converting them one by one is converting them at once."""

import json
from functools import partial

import pytest
import torch

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.conversion import ConversionReport, ConversionSchedule, converted_before
from cald_speech.errors import UserError
from cald_speech.mixers import Bidirectional, Linformer, Mamba2
from tests.helpers import SPEECH, audio_batch, tiny_model


@pytest.mark.parametrize(
    ("steps", "order", "groups"),
    [
        ([0], "top", [(4, 3, 1, 0)]),
        ([0, 10], "bottom", [(0, 1), (3, 4)]),
        ([0, 10, 20], "top", [(4, 3), (1,), (0,)]),
        ([5, 10], [3, 0, 4, 1], [(3, 0), (4, 1)]),
    ],
)
def test_layers_are_shared_out_in_their_order(steps, order, groups):
    assert ConversionSchedule(steps, order).groups([1, 0, 3, 4]) == groups


def test_by_importance_the_cheapest_layer_comes_first(tmp_path):
    """The file has the costliest first, and kept layers too."""
    path = tmp_path / "layer_importance.json"
    path.write_text(json.dumps({"layers": [{"layer": layer} for layer in (2, 0, 3, 1)]}))
    assert ConversionSchedule([0, 1, 2], str(path)).groups([0, 1, 3]) == [(1,), (3,), (0,)]


@pytest.mark.parametrize("steps", [[], [1, 1], [2, 1], [-1], [0.5], [True], "0", 3])
def test_steps_that_do_not_ascend_are_refused(steps):
    with pytest.raises(UserError, match=r"^conversion_schedule\.steps: expected optimiser steps that ascend"):
        ConversionSchedule(steps)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([0, 1], r"order: expected each of the layers that layer_map converts once \(0, 1, 2\), got 0, 1"),
        ([0, 1, 1], r"got 0, 1, 1"),
        ("sideways", "order: expected top, bottom, a list of layers, or the layer_importance.json .* got 'sideways'"),
    ],
)
def test_an_order_of_other_layers_is_refused(order, said):
    with pytest.raises(UserError, match=f"^conversion_schedule.{said}" if "order" in said else said):
        ConversionSchedule([0], order).groups([0, 1, 2])


@pytest.mark.parametrize("order", ["top", "bottom"])
@pytest.mark.parametrize(
    ("family", "mixer"),
    [
        ("wav2vec2", partial(Linformer, k=5, max_length=300, sharing="layer")),
        ("wavlm", partial(Bidirectional, share_projections=True)),
    ],
    ids=["shared parameters", "WavLM's position bias"],
)
def test_one_by_one_is_at_once(family, mixer, order, tmp_path):
    """The same tensors, those that layers share among them; saved half-way and at the end, it loads as what it is."""
    layer_map = LayerMap(mixer)
    at_once, model = (tiny_model(SPEECH[family]) for _ in range(2))
    expected = convert(at_once, layer_map)
    groups, found = ConversionSchedule([0, 1, 2], order).groups([0, 1, 2]), []
    audio, mask = audio_batch([4000, 2500])
    for count in (1, 2, 3):
        found.append(convert(model, converted_before(layer_map, groups[:count], 3)))
        model.save_pretrained(tmp_path / str(count))
        loaded = from_pretrained(tmp_path / str(count))
        assert ConversionReport.of(loaded).layers == found[-1].layers
        with torch.no_grad():
            assert torch.equal(*(of(audio, attention_mask=mask).logits for of in (loaded, model.eval())))
    assert sum(name == "attention" for name in found[0].layers) == 2
    assert found[-1].layers == expected.layers and found[-1].num_parameters_after == expected.num_parameters_after
    assert model.state_dict().keys() == at_once.state_dict().keys()
    told = {name for report in found for name in (*report.new, *report.copied)}
    assert told >= {*expected.new, *expected.copied}


def test_a_layer_that_has_another_mixer_already_is_refused():
    model = tiny_model(SPEECH["wav2vec2"])
    convert(model, LayerMap(None, {1: Bidirectional}))
    for other, name in ((Mamba2, "Mamba2"), (None, "attention")):
        with pytest.raises(UserError, match=f"layer 1 is converted already, and has Bidirectional: .* got {name}"):
            convert(model, LayerMap(Bidirectional, {1: other}))
