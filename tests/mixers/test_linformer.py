"""Linformer: its formula, the lengths it takes, and projections that layers share."""

import copy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import cald_speech
from cald_speech import LayerMap, convert
from cald_speech.errors import UserError
from cald_speech.mixers import Bidirectional, Linformer
from tests.helpers import SPEECH, SPEECH_CASES, TOLERANCE, audio_batch, padded_batch, relative_error, tiny_model

WIDTH, HEADS = 32, 4
FAMILIES = SPEECH
SHARED = partial(Linformer, k=7, max_length=60, sharing="layer")
every_family = pytest.mark.parametrize("family", SPEECH_CASES)


def mixers_of(model, family) -> list[Linformer]:
    return [family.mixer(layer) for layer in family.layers(model)]


@pytest.mark.parametrize("sharing", ["none", "kv"])
@torch.no_grad()
def test_is_softmax_attention_to_mixed_keys_and_values(sharing):
    mixer = Linformer(WIDTH, HEADS, k=5, max_length=30, sharing=sharing)
    x, lengths = padded_batch((20, 13), WIDTH)
    y = mixer(x, lengths)
    E, F = mixer.mix_keys, mixer.mix_keys if sharing == "kv" else mixer.mix_values
    for row, length in enumerate(lengths.tolist()):
        frames = x[row, :length]
        q, k, v = (
            p(frames).unflatten(1, (HEADS, 8)).transpose(0, 1) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        keys, values = E[:, :length] @ k / length**0.5, F[:, :length] @ v / length**0.5
        heads = (q @ keys.transpose(1, 2) / 8**0.5).softmax(-1) @ values
        expected = mixer.out_proj(heads.transpose(0, 1).flatten(1))
        assert relative_error(y[row, :length], expected) <= TOLERANCE["rounding"]


def test_start_of_the_mixing_weights():
    mixer = Linformer(64, 4)
    for weights in (mixer.mix_keys, mixer.mix_values):
        assert weights.shape == (256, 1536)
        assert weights.std().item() == pytest.approx(1, rel=0.01)


def test_a_longer_input_is_refused():
    mixer = Linformer(WIDTH, HEADS, max_length=10)
    assert mixer(torch.randn(1, 10, WIDTH)).shape == (1, 10, WIDTH)
    with pytest.raises(ValueError, match=r"max_length: .* up to 10 frames, and got 11\. .* larger max_length"):
        mixer(torch.randn(1, 11, WIDTH))
    with pytest.raises(UserError):  # which the command line prints without a traceback
        mixer(torch.randn(1, 11, WIDTH))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharing": "all"}, "sharing: expected one of none, kv, layer, got 'all'"),
        ({"k": 0}, "k, max_length: expected at least 1"),
        ({"max_length": 0}, "k, max_length: expected at least 1"),
    ],
    ids=["sharing", "k", "max_length"],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Linformer(WIDTH, HEADS, **options)


@pytest.mark.parametrize("sharing", ["none", "kv", "layer"])
@every_family
def test_one_projection_for_all_layers_or_one_for_each(family, sharing):
    model = tiny_model(family)
    report = convert(model, LayerMap(partial(Linformer, k=7, max_length=60, sharing=sharing)))
    first, *others = mixers_of(model, family)
    assert all((other.mix_keys is first.mix_keys) == (sharing == "layer") for other in others)
    mixing = [name for name in report.new if "mix_" in name]
    assert len(mixing) == {"none": 6, "kv": 3, "layer": 1}[sharing]
    assert report.num_parameters_after == sum(p.numel() for p in model.parameters())


def test_layers_share_where_their_entries_are_equal():
    family = FAMILIES["hubert"]
    model = tiny_model(family, layers=5)
    other = partial(Linformer, k=3, max_length=60, sharing="layer")
    convert(model, LayerMap(SHARED, {1: other, 2: Bidirectional, 3: other}))
    weights = [mixer.mix_keys for index, mixer in enumerate(mixers_of(model, family)) if index != 2]
    assert weights[0] is weights[3] and weights[1] is weights[2] and weights[0] is not weights[1]


@every_family
@torch.no_grad()
def test_shared_projections_are_saved_once_and_shared_after_loading(family, tmp_path):
    model = tiny_model(family)
    convert(model, LayerMap(SHARED))
    model.eval().save_pretrained(tmp_path / "model")
    audio, mask = audio_batch((8000, 5000))
    expected = model(audio, attention_mask=mask).logits
    for dtype in (torch.float32, torch.bfloat16):
        loaded = cald_speech.from_pretrained(tmp_path / "model", dtype=dtype)
        first, *others = mixers_of(loaded, family)
        assert all(other.mix_keys is first.mix_keys for other in others) and first.mix_keys.dtype == dtype
    loaded = cald_speech.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(audio, attention_mask=mask).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert files[0] == files[1] and files[0].count(b"mix_keys") == 1
    base = cald_speech.from_pretrained(tmp_path / "model", head="base")
    assert mixers_of(base, family)[2].mix_keys is mixers_of(base, family)[0].mix_keys
    twin = copy.deepcopy(model)
    assert mixers_of(twin, family)[1].mix_keys is mixers_of(twin, family)[0].mix_keys


def test_a_folder_without_the_shared_projection_is_refused(tmp_path):
    family = FAMILIES["hubert"]
    model = tiny_model(family)
    convert(model, LayerMap(SHARED))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "mix_keys" not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing \(.*mix_keys"):
        cald_speech.from_pretrained(tmp_path)
