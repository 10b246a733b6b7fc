"""Models in int8: near what they are in float32, in every family and mixer, and good for nothing but running."""

import copy

import pytest
import torch
from torch import nn

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.conversion.int8 import INT8, Int8Linear, count_parameters, in_int8
from cald_speech.errors import UserError
from cald_speech.families import SpeechFamily, families
from cald_speech.longform.encoder import stream_logits
from cald_speech.longform.source import AudioSource
from cald_speech.mixers import Bidirectional, Mixer
from tests.conversion.test_adapters import heard, of_every
from tests.helpers import audio_batch, relative_error, tiny_model

SPEECH = [name for name, family in families().items() if isinstance(family, SpeechFamily) and "ctc" in family.heads]


def logits(model) -> torch.Tensor:
    samples, mask = audio_batch([6000, 3500])
    with torch.no_grad():
        return heard(model(samples, attention_mask=mask))


def test_every_mixer_is_near_what_it_is_in_float32():
    layer_map = of_every(Mixer)
    model = tiny_model(families()["wav2vec2"], layers=len(layer_map.overrides) + 1)
    convert(model, layer_map)
    expected, head, parameters = logits(model), model.lm_head, count_parameters(model)
    kind = type(model)
    assert in_int8(model) is model and isinstance(model, kind) and type(model).__name__ == kind.__name__
    assert 1e-5 < relative_error(logits(model), expected) < 0.03
    assert not any(isinstance(m, nn.Linear) for m in model.wav2vec2.encoder.layers.modules())
    assert model.lm_head is head and isinstance(model.wav2vec2.feature_projection.projection, nn.Linear)
    assert count_parameters(model) == parameters
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["wavlm", *(pytest.param(n, marks=pytest.mark.wide) for n in SPEECH if n != "wavlm")])
def test_every_family_long_and_short(name):
    """A kept layer, whose attention may multiply by itself, and a converted one."""
    model = tiny_model(families()[name], layers=2)
    convert(model, LayerMap(None, {1: Bidirectional}))
    source = AudioSource.from_samples(torch.randn(16_000, generator=torch.Generator().manual_seed(0)))
    expected = torch.cat([piece for _, piece in stream_logits(model, source)])
    actual = torch.cat([piece for _, piece in stream_logits(model, source, dtype=INT8)])
    assert 1e-6 < relative_error(actual, expected) < 0.15
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


REFUSED = {
    "cannot be trained": lambda model, folder: model.train(),
    "cannot be saved": lambda model, folder: model.save_pretrained(folder / "again"),
    "cannot become torch.float16": lambda model, folder: model.half(),
    "torch.float32 on meta": lambda model, folder: model.to("meta"),
    "expected a CPU": lambda model, folder: from_pretrained(folder, dtype=INT8, device="cuda"),
    "expected a model in float32": lambda model, folder: in_int8(from_pretrained(folder, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(tmp_path, message):
    tiny_model(families()["wav2vec2"], layers=1).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, dtype=INT8)
    model.eval().to("cpu")
    with pytest.raises(UserError, match=message):
        REFUSED[message](model, tmp_path)
