"""What every family of speech encoders promises, on tiny random models and both front-end norms.

A new family is found here by itself; test_text_contract.py has the same promises of families that read text.
"""

from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from cald_speech import LayerMap, convert
from cald_speech.families import family_of
from cald_speech.families.wav2vec2_conformer import ConformerAttention
from cald_speech.families.wavlm import GatedBiasAttention
from cald_speech.longform import AudioSource, stream_logits
from cald_speech.mixers import Bidirectional
from tests.families.contract import captured_layers, check_alone_is_padded, check_checkpointing, check_opened_layers
from tests.helpers import (
    SPEECH,
    SPEECH_CASES,
    TOLERANCE,
    audio_batch,
    names_in_attention,
    one_frame,
    relative_error,
    tiny_config,
    tiny_model,
    wide_unless_usual,
)

FAMILIES = SPEECH
NORMS = ("group", "layer")
LAYERS = 3
SHARED = partial(Bidirectional, share_projections=True)
MAPS = {
    "kept": LayerMap(),
    "all converted": LayerMap(SHARED),
    "first converted": LayerMap(None, {0: Bidirectional}),
    "first kept": LayerMap(SHARED, {0: None}),
    "middle kept": LayerMap(SHARED, {1: None}),
}


def samples_of(model: PreTrainedModel) -> tuple[int, ...]:
    """Of four utterances, the third of which has one frame in the layers."""
    return 8000, 5000, one_frame(model), 3333


# Where convolutions behind the front end read what stands in the padding.
TRUE_ALONE_ONLY = ("data2vec-audio", "sew", "wav2vec2-conformer")

every_family = pytest.mark.parametrize("family", SPEECH_CASES)
both_norms = pytest.mark.parametrize("norm", NORMS)
every_map = pytest.mark.parametrize("layer_map", MAPS.values(), ids=MAPS)
every_attention = pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param(family, attention, id=f"{name}-{attention}", marks=wide_unless_usual(name))
        for name, family in FAMILIES.items()
        for attention in (("eager",) if name == "wavlm" else ("eager", "sdpa"))
    ],
)


def converted(family, norm, layer_map, **options) -> PreTrainedModel:
    model = tiny_model(family, norm, LAYERS, **options)
    convert(model, layer_map)
    return model.eval()


def plain(model: PreTrainedModel, family) -> PreTrainedModel:
    """Hugging Face's own model with the same weights, which never met this package's code."""
    twin = family.classes["ctc"](model.config)
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation(model.config._attn_implementation)
    return twin.eval()


def valid_logits(model) -> list[torch.Tensor]:
    """The logits of each utterance of one padded batch, without the padding."""
    samples = samples_of(model)
    audio, mask = audio_batch(samples)
    logits = model(audio, attention_mask=mask).logits
    frames = model._get_feat_extract_output_lengths(torch.tensor(samples)).tolist()
    return [row[:length] for row, length in zip(logits, frames, strict=True)]


def logits_alone(model) -> list[torch.Tensor]:
    samples = samples_of(model)
    audio, _ = audio_batch(samples)
    return [model(audio[row : row + 1, :length]).logits[0] for row, length in enumerate(samples)]


@every_family
def test_is_found_by_its_configs(family):
    assert family_of(family.config_class()) is family
    model = converted(family, "layer", MAPS["all converted"])
    assert family_of(model) is family and family_of(model.config) is family


@pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])
@every_map
@both_norms
@every_attention
@torch.no_grad()
def test_open_rebuilds_every_layer_to_the_bit(family, attention, norm, layer_map, padded):
    model = converted(family, norm, layer_map)
    model.set_attn_implementation(attention)
    audio, mask = audio_batch(samples_of(model) if padded else samples_of(model)[:1])
    with captured_layers(model, family) as states:
        model(audio, attention_mask=mask if padded else None)
    assert (family.context(model).frames is not None) == padded
    check_opened_layers(model, family, layer_map, states)


@both_norms
@every_attention
@torch.no_grad()
def test_without_mixers_it_is_hugging_faces_model_on_single_utterances(family, attention, norm):
    model = converted(family, norm, MAPS["kept"])
    model.set_attn_implementation(attention)
    twin = plain(model, family)
    for ours, theirs in zip(logits_alone(model), logits_alone(twin), strict=True):
        assert torch.equal(ours, theirs)


@every_attention
@torch.no_grad()
def test_without_mixers_it_is_hugging_faces_layer_norm_model_on_padded_batches(family, attention):
    if family.model_type in TRUE_ALONE_ONLY:
        pytest.skip("Hugging Face's own padded batches differ from its single utterances")
    model = converted(family, "layer", MAPS["kept"])
    model.set_attn_implementation(attention)
    for ours, theirs in zip(valid_logits(model), valid_logits(plain(model, family)), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE["rounding"]


@every_attention
@torch.no_grad()
def test_padded_batches_of_a_group_norm_model_are_hugging_faces_one_by_one(family, attention):
    model = converted(family, "group", MAPS["kept"])
    model.set_attn_implementation(attention)
    twin = plain(model, family)
    for ours, theirs in zip(valid_logits(model), logits_alone(twin), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE["rounding"]
    # Hugging Face's own batches count the padding in, which is why the norm is replaced.
    assert relative_error(valid_logits(twin)[1], logits_alone(twin)[1]) > 0.01


@every_map
@both_norms
@every_family
def test_alone_equals_padded_in_outputs_and_gradients(family, norm, layer_map):
    model = converted(family, norm, layer_map)
    check_alone_is_padded(model, valid_logits(model), logits_alone(model))


@every_map
@both_norms
@every_family
@torch.no_grad()
def test_batch_order_does_not_matter(family, norm, layer_map):
    model = converted(family, norm, layer_map)
    audio, mask = audio_batch(samples_of(model))
    order = torch.tensor([2, 0, 3, 1])
    frames = model._get_feat_extract_output_lengths(mask.sum(-1))
    expected = model(audio, attention_mask=mask).logits
    shuffled = model(audio[order], attention_mask=mask[order]).logits[order.argsort()]
    for row, length in enumerate(frames.tolist()):
        assert relative_error(shuffled[row, :length], expected[row, :length]) <= TOLERANCE["rounding"]


# Not WavLM with reentrant checkpoints: its layers share the position bias, through which Hugging Face's own model of
# two layers runs backward again and again (transformers 5.23).
@pytest.mark.parametrize(
    ("family", "use_reentrant"),
    [
        pytest.param(family, r, id=f"{name}-{'' if r else 'not '}reentrant", marks=wide_unless_usual(name))
        for name, family in FAMILIES.items()
        for r in (False, True)
        if not (r and name == "wavlm")
    ],
)
@pytest.mark.parametrize(
    "layer_map", [MAPS["all converted"], MAPS["middle kept"]], ids=["all converted", "middle kept"]
)
@both_norms
def test_gradient_checkpointing_gives_the_same_gradients(family, norm, layer_map, use_reentrant):
    model = converted(family, norm, layer_map)
    slot, _ = family.slot_ends(family.layers(model)[0])
    check_checkpointing(model, slot, lambda: valid_logits(model), use_reentrant=use_reentrant)


@pytest.mark.parametrize(
    "pattern",
    [[0, 0, 1, 1], [1, 0, 1, 1]],
    ids=["left padding", "a hole"],
)
@both_norms
@every_family
def test_left_padding_is_refused(family, norm, pattern):
    model = tiny_model(family, norm)
    audio, _ = audio_batch((2000, 2000))
    mask = torch.ones(2, 2000, dtype=torch.long)
    mask[1] = torch.tensor(pattern).repeat_interleave(500)
    with pytest.raises(ValueError, match=r"attention_mask: .*right padding.*padding_side = 'right'"):
        model(audio, attention_mask=mask)


@pytest.mark.parametrize("kind", ["int64", "bool", "float32"])
@every_family
@torch.no_grad()
def test_masks_of_any_dtype_and_by_position(family, kind):
    model = converted(family, "group", MAPS["all converted"])
    audio, mask = audio_batch(samples_of(model))
    expected = model(audio, attention_mask=mask).logits
    assert torch.equal(model(audio, attention_mask=mask.to(getattr(torch, kind))).logits, expected)
    assert torch.equal(model(audio, mask).logits, expected)


@every_family
@torch.no_grad()
def test_lengths_of_one_batch_do_not_stay_for_the_next(family):
    model = converted(family, "group", MAPS["all converted"])
    audio, mask = audio_batch(samples_of(model))
    expected = model(audio).logits
    model(audio, attention_mask=mask)
    assert torch.equal(model(audio).logits, expected)
    assert torch.equal(model(audio, attention_mask=torch.ones_like(mask)).logits, expected)


@both_norms
@every_family
def test_attention_weights_are_the_layers_own(family, norm):
    model = tiny_model(family, norm)
    layer = family.layers(model)[1]
    weights = family.attention_weights(model, layer)
    assert weights.q.shape == weights.k.shape == weights.v.shape == (2, 16, 32) and weights.o.shape == (32, 2, 16)
    _, _, k, v, o = (getattr(family.attention(layer), name, None) for name in names_in_attention(family))
    assert torch.equal(weights.k.reshape(32, 32), k.weight)
    assert torch.equal(weights.v_bias.flatten(), v.bias)
    assert torch.equal(weights.o.reshape(32, 32), o.weight)
    assert torch.equal(weights.o_bias, o.bias)
    # An attention that sees one frame puts out v through o, whatever q and k are.
    x = torch.randn(1, 1, 32)
    v = torch.einsum("btd,hkd->bthk", x, weights.v) + weights.v_bias
    by_hand = torch.einsum("bthk,dhk->btd", v, weights.o) + weights.o_bias
    slot = family.open(layer).slot
    assert relative_error(slot(x, **family.layer_arguments(model, x, None)), by_hand) <= TOLERANCE["rounding"]


@every_family
def test_attention_weights_of_a_converted_layer_are_refused(family):
    model = converted(family, "layer", MAPS["first converted"])
    with pytest.raises(ValueError, match="expected a layer with attention, got one with Bidirectional"):
        family.attention_weights(model, family.layers(model)[0])


@both_norms
@every_family
@torch.no_grad()
def test_front_end_and_layers_make_the_model(family, norm):
    """What runs in chunks later: convolutions, projection, positions, norms and opened layers are all there is."""
    model = converted(family, norm, MAPS["all converted"])
    audio, _ = audio_batch((6000,))
    front = family.front_end(model)
    x = front.convolutions(audio).transpose(1, 2)
    x = front.projection(x)
    x = front.input_norm(front.with_positions(x))
    for layer in family.layers(model):
        before, slot, after, _ = family.open(layer)
        x = after(x, slot(before(x)))
    assert torch.equal(family.head(model)(front.output_norm(x)), model(audio).logits)
    assert torch.equal(family.final_norm(model)(x), front.output_norm(x))


@every_map
@both_norms
@every_family
@torch.no_grad()
def test_long_form_is_the_whole(family, norm, layer_map):
    """In one call and ordinary blocks; tests/longform/test_encoder.py cuts the audio up in all ways."""
    model = converted(family, norm, layer_map)
    audio, _ = audio_batch((20_000,))
    parts = stream_logits(model, AudioSource.from_samples(audio[0]), do_normalize=False)
    assert relative_error(torch.cat([logits for _, logits in parts]), model(audio).logits[0]) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("entries", [1, 200], ids=["query by query", "a few queries"])
@every_family
@torch.no_grad()
def test_attention_in_blocks_is_the_attention(family, entries, monkeypatch):
    model = tiny_model(family)
    for attention in (GatedBiasAttention, ConformerAttention):
        monkeypatch.setattr(attention, "ENTRIES", entries)
    x = torch.randn(1, 23, 32)
    for layer in family.layers(model):
        attention = family.block_attention(model, layer)
        starts = (0, 5, 6, 20)
        made = [attention.keys_values(p, a) for p, a in zip(x.split((5, 1, 14, 3), 1), starts, strict=True)]
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*made, strict=True))
        parts = [attention.attend(p, keys, values, a) for p, a in zip(x.split((5, 1, 14, 3), 1), starts, strict=True)]
        expected = family.open(layer).slot(x, **family.layer_arguments(model, x, None))
        assert relative_error(torch.cat(parts, dim=1), expected) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("layer_map", [LayerMap(SHARED, {2: None}), LayerMap(None, {0: SHARED})], ids=["0 and 1", "0"])
@both_norms
@torch.no_grad()
def test_wavlms_position_bias_outlives_its_first_attention(norm, layer_map):
    """Layer 0 computes the bias that every later attention reads; converting it must not change what they get."""
    family, biases = FAMILIES["wavlm"], []
    for chosen in (MAPS["kept"], layer_map):
        model = converted(family, norm, chosen)
        last = family.layers(model)[2].attention
        last.register_forward_pre_hook(lambda _, args, kwargs: biases.append(kwargs["position_bias"]), with_kwargs=True)
        audio, mask = audio_batch(samples_of(model))
        model(audio, attention_mask=mask)
    assert biases[0].any() and torch.equal(biases[0], biases[1])


@every_family
def test_config_gives_a_model_without_layerdrop(family):
    config = tiny_config(family, layerdrop=0.3)
    assert family.load(config).config.layerdrop == 0.0
    assert config.layerdrop == 0.3
    assert family.load(config, layerdrop=0.2).config.layerdrop == 0.2
