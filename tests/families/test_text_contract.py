"""What every family of text models promises, on tiny random models of every layout. A new family is found by itself."""

import copy

import pytest
import torch

from cald_speech import LayerMap, convert
from cald_speech.conversion import type_name
from cald_speech.errors import UserError
from cald_speech.families import family_of
from cald_speech.longform import AudioSource, encode_long, latency_s, transcribe
from cald_speech.mixers import Bidirectional, Hydra, Linformer, Mamba2, WindowedAttention
from tests.families.contract import captured_layers, check_alone_is_padded, check_checkpointing, check_opened_layers
from tests.families.text import (
    CASES,
    CAUSAL,
    ENCODERS,
    HEADS,
    LENGTHS,
    MAPS,
    SHARED,
    WIDTH,
    each,
    logits_alone,
    positions_of,
    tokens_and_mask,
    valid_logits,
)
from tests.helpers import TOLERANCE, relative_error

every_case = pytest.mark.parametrize("case", each(CASES))
every_causal = pytest.mark.parametrize("case", each(CAUSAL))
every_encoder = pytest.mark.parametrize("case", each(ENCODERS))
every_map = pytest.mark.parametrize("chosen", MAPS)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
WITHOUT_CACHE = {True: {"use_cache": False}, False: {}}  # by whether the family is causal
every_padding = pytest.mark.parametrize(
    ("case", "left"),
    each(
        {
            f"{name} {side}": (case, side == "left")
            for name, case in CASES.items()
            for side in (("right", "left") if case.family.causal else ("right",))
        }
    ),
)


@every_case
def test_is_found_by_its_configs(case):
    assert family_of(case.family.config_class()) is case.family
    model = case.converted("all converted")
    assert family_of(model) is case.family and family_of(model.config) is case.family


@pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])
@every_map
@every_attention
@every_case
@torch.no_grad()
def test_open_rebuilds_every_layer_to_the_bit(case, attention, chosen, padded):
    family = case.family
    model = case.converted(chosen)
    model.set_attn_implementation(attention)
    tokens, mask = tokens_and_mask(LENGTHS if padded else LENGTHS[:1], pad=model.config.pad_token_id)
    family.context(model)  # lengths are read from the first time that somebody asks for them
    with captured_layers(model, family) as states:
        model(tokens, attention_mask=mask if padded else None, **WITHOUT_CACHE[family.causal])
    assert (family.context(model).frames is not None) == padded
    check_opened_layers(model, family, case.maps()[chosen], states)


@every_map
@every_case
@torch.no_grad()
def test_layers_norm_and_head_make_the_model(case, chosen):
    family = case.family
    model = case.converted(chosen)
    tokens, _ = tokens_and_mask((9,))
    with captured_layers(model, family) as states:
        model(tokens, **WITHOUT_CACHE[family.causal])
    x = family.final_norm(model)(states[-1][1])
    assert torch.equal(family.head(model)(x), model(tokens).logits)


@every_map
@every_case
@torch.no_grad()
def test_slot_ends_see_what_goes_in_and_out(case, chosen):
    family = case.family
    model = case.converted(chosen)
    tokens, _ = tokens_and_mask((9,))
    layer, seen = family.layers(model)[1], {}
    first, last = family.slot_ends(layer)
    first.register_forward_pre_hook(lambda _, args, kw: seen.update(x=(*args, *kw.values())[0]), with_kwargs=True)
    last.register_forward_hook(lambda _, args, out: seen.update(y=out[0] if isinstance(out, tuple) else out))
    with captured_layers(model, family) as states:
        model(tokens, **WITHOUT_CACHE[family.causal])
    x, expected = states[1]
    before, _, after, _ = family.open(layer)
    assert torch.equal(before(x), seen["x"]) and torch.equal(after(x, seen["y"]), expected)


@every_attention
@every_padding
@torch.no_grad()
def test_without_mixers_it_is_hugging_faces_model(case, left, attention):
    model = case.converted("kept")
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    twin.eval()
    for m in (model, twin):
        m.set_attn_implementation(attention)
    for ours, theirs in zip(logits_alone(model), logits_alone(twin), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(valid_logits(model, left=left), valid_logits(twin, left=left), strict=True):
        assert torch.equal(ours, theirs)


@every_map
@every_padding
def test_alone_equals_padded_in_outputs_and_gradients(case, left, chosen):
    model = case.converted(chosen)
    check_alone_is_padded(model, valid_logits(model, left=left), logits_alone(model))


@every_map
@every_padding
@torch.no_grad()
def test_a_label_does_not_change_with_the_batch(case, left, chosen):
    model = case.converted(chosen, "classification")
    tokens, mask = tokens_and_mask(left=left, pad=model.config.pad_token_id)
    expected = model(tokens, attention_mask=mask, **(positions_of(model, mask) if left else {})).logits
    rows, _ = tokens_and_mask()
    alone = [model(rows[row : row + 1, :length]).logits for row, length in enumerate(LENGTHS)]
    assert relative_error(torch.cat(alone), expected) <= TOLERANCE["rounding"]


# With reentrant checkpoints one map is enough: that a slot runs again does not hang on its mixer.
@pytest.mark.parametrize(
    ("chosen", "use_reentrant"),
    [("all converted", False), ("middle kept", False), ("paper", False), ("middle kept", True)],
    ids=["all converted", "middle kept", "paper", "middle kept-reentrant"],
)
@every_padding
def test_gradient_checkpointing_gives_the_same_gradients(case, left, chosen, use_reentrant):
    model = case.converted(chosen)
    slot, _ = case.family.slot_ends(case.family.layers(model)[0])
    check_checkpointing(model, slot, lambda: valid_logits(model, left=left), use_reentrant=use_reentrant)


@every_map
@every_causal
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(case, chosen):
    model = case.converted(chosen)
    tokens, _ = tokens_and_mask((12,))
    expected = model(tokens).logits
    for changed in (1, 6, 11):
        others = tokens.clone()
        others[:, changed:] = (others[:, changed:] + 7) % 40 + 5
        logits = model(others).logits
        assert relative_error(logits[:, :changed], expected[:, :changed]) <= TOLERANCE["rounding"]
        assert relative_error(logits[:, changed:], expected[:, changed:]) > 0.01


@pytest.mark.parametrize("mixer", [Bidirectional, SHARED, Linformer, Hydra, WindowedAttention], ids=type_name)
@every_causal
def test_a_mixer_that_sees_the_future_is_refused_in_a_causal_model(case, mixer):
    model = case.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"layer_map: \w+ models are causal, and in layer 1 .*Expected a causal mixer"):
        convert(model, LayerMap(Mamba2, {1: mixer}))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in after.items())


@every_causal
def test_what_is_no_mixer_is_refused_in_a_causal_model(case):
    with pytest.raises(ValueError, match="expected a Mixer class or a partial of one"):
        convert(case.model(), LayerMap(lambda width, heads: Mamba2(width, heads)))


def mask_of(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows)


@every_case
@torch.no_grad()
def test_masks_with_holes_are_refused(case):
    model = case.converted("first converted")
    tokens, _ = tokens_and_mask((4, 4))
    with pytest.raises(ValueError, match=r"attention_mask: .*in one piece.*padding_side"):
        model(tokens, attention_mask=mask_of((1, 1, 1, 1), (1, 0, 1, 1)))
    with pytest.raises(UserError, match=r"attention_mask: expected ones and zeros of shape .* got 4 dimensions"):
        model(tokens, attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))


@every_encoder
@torch.no_grad()
def test_an_encoder_refuses_left_padding(case):
    model = case.converted("first converted")
    tokens, _ = tokens_and_mask((4, 4))
    with pytest.raises(ValueError, match=r"attention_mask: .*padded on the right, got another"):
        model(tokens, attention_mask=mask_of((1, 1, 1, 1), (0, 0, 1, 1)))


@pytest.mark.parametrize("kind", ["int64", "bool", "float32"])
@every_case
@torch.no_grad()
def test_masks_of_any_dtype_and_by_position(case, kind):
    model = case.converted("all converted")
    tokens, mask = tokens_and_mask(pad=model.config.pad_token_id)
    expected = model(tokens, attention_mask=mask).logits
    assert torch.equal(model(tokens, attention_mask=mask.to(getattr(torch, kind))).logits, expected)
    if case.family.mask_at == 1:
        assert torch.equal(model(tokens, mask).logits, expected)
    embedded = model.get_input_embeddings()(tokens)
    by_embedding = model(inputs_embeds=embedded, attention_mask=mask).logits
    valid = mask.bool()
    if case.family.causal:
        assert torch.equal(by_embedding[valid], expected[valid])


@every_case
@torch.no_grad()
def test_lengths_of_one_batch_do_not_stay_for_the_next(case):
    model = case.converted("all converted")
    tokens, mask = tokens_and_mask(pad=model.config.pad_token_id)
    expected = model(tokens).logits
    model(tokens, attention_mask=mask)
    assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(mask)).logits, expected)


@every_case
@torch.no_grad()
def test_a_copy_has_lengths_of_its_own(case):
    model = case.converted("all converted")
    valid_logits(model)
    twin = copy.deepcopy(model)
    expected = valid_logits(model)
    assert all(torch.equal(a, b) for a, b in zip(valid_logits(twin), expected, strict=True))
    valid_logits(twin, lengths=(5, 3))
    ours, theirs = case.family.context(model), case.family.context(twin)
    assert ours.frames.tolist() == list(LENGTHS) and theirs.frames.tolist() == [5, 3]
    assert all(case.family.slot_ends(layer)[0].context is theirs for layer in case.family.layers(twin))


@pytest.mark.parametrize("case", [c for n, c in CASES.items() if n != "qwen3"], ids=[n for n in CASES if n != "qwen3"])
@torch.no_grad()
def test_attention_weights_make_the_attention(case):
    """Softmax attention by hand, with all tokens at position 0, where rotary positions turn nothing."""
    family, model = case.family, case.model()
    layer = family.layers(model)[1]
    weights = family.attention_weights(model, layer).expanded()
    assert weights.q.shape == (HEADS, WIDTH // HEADS, WIDTH) and weights.o.shape == (WIDTH, HEADS, WIDTH // HEADS)
    x = torch.randn(2, 3, WIDTH)  # within every window
    q, k, v = (
        torch.einsum("btd,hkd->bhtk", x, weight) + (0 if bias is None else bias[:, None])
        for weight, bias in ((weights.q, weights.q_bias), (weights.k, weights.k_bias), (weights.v, weights.v_bias))
    )
    scores = q @ k.mT * (WIDTH // HEADS) ** -0.5
    if family.causal:
        scores = scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
    by_hand = torch.einsum("bhtk,dhk->btd", scores.softmax(-1) @ v, weights.o)
    by_hand = by_hand if weights.o_bias is None else by_hand + weights.o_bias
    arguments = family.layer_arguments(model, x, None)
    positions, turned = torch.zeros(1, 3, dtype=torch.long), arguments.get("position_embeddings")
    if isinstance(turned, dict):
        arguments["position_embeddings"] = {kind: model.base_model.rotary_emb(x, positions, kind) for kind in turned}
    elif turned is not None:
        arguments["position_embeddings"] = model.base_model.rotary_emb(x, position_ids=positions)
    assert relative_error(family.open(layer).slot(x, **arguments), by_hand) <= TOLERANCE["rounding"]


@torch.no_grad()
def test_the_norms_of_qwen3s_queries_and_keys_go_into_the_rows():
    model = CASES["qwen3"].model()
    layer = CASES["qwen3"].family.layers(model)[1]
    layer.self_attn.q_norm.weight.uniform_(0.5, 2)
    weights = CASES["qwen3"].family.attention_weights(model, layer)
    x = torch.randn(20_000, WIDTH)
    q = torch.einsum("td,hkd->thk", x, weights.q)
    exact = layer.self_attn.q_norm(layer.self_attn.q_proj(x).unflatten(-1, (HEADS, -1)))
    assert relative_error(q.square().mean(0).sqrt().mean(1), exact.square().mean(0).sqrt().mean(1)) < 0.1
    assert torch.equal(weights.v.flatten(0, 1), layer.self_attn.v_proj.weight)


@every_case
def test_attention_weights_of_a_converted_layer_are_refused(case):
    model = case.converted("first converted")
    with pytest.raises(ValueError, match="expected a layer with attention, got one with"):
        case.family.attention_weights(model, case.family.layers(model)[0])


@every_case
def test_the_report_names_what_was_copied_and_what_is_gone(case):
    family, model = case.family, case.model()
    layer_map = LayerMap(None, {1: case.maps()["all converted"].default})
    old = {f"{name}": id(p) for name, p in model.named_parameters()}
    report = convert(model, layer_map)
    assert len(report.copied) == 4 and all(".1." in n for n in report.copied), report.copied
    assert set(report.removed) == old.keys() - dict(model.named_parameters()).keys()
    weights = {name for name in report.removed if name.endswith("weight")}
    fused = family.model_type in ("gpt_neox", "gpt2", "modernbert")
    norms = 2 if family.model_type == "qwen3" else 0
    assert len(weights) == (2 if fused else 4) + norms  # the output projection too, wherever it stood
    assert set(report.untouched) | set(report.copied) | set(report.new) == dict(model.named_parameters()).keys()


@every_case
def test_what_hears_audio_refuses_it(case, tmp_path):
    model = case.converted("all converted")
    with pytest.raises(UserError, match="expected a model that hears audio, got Cald"):
        encode_long(model, AudioSource.from_samples(torch.zeros(16_000)))
    with pytest.raises(UserError, match="expected a model that hears audio, got Cald"):
        latency_s(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"head: expected one of base, .*, got 'ctc'"):
        transcribe(tmp_path, torch.zeros(16_000))
    with pytest.raises(UserError, match=r"head: expected one of base, .*, got 'ctc'"):
        case.family.class_with("ctc")


def test_a_decoder_with_an_encoders_layers_is_refused():
    for case in ENCODERS.values():
        with pytest.raises(UserError, match="is_decoder: expected an encoder"):
            case.model(is_decoder=True)


@every_case
def test_a_head_is_named_where_there_is_none(case):
    with pytest.raises(UserError, match=r"expected a model with an? .*LM head, got .*Load it with head="):
        case.family.head(case.model("base"))
