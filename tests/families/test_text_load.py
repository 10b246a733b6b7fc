"""Which text checkpoints load, under which names, and that converted ones come back to the bit by every way in."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForPreTraining,
)

import cald_speech
from cald_speech.errors import UserError
from cald_speech.families.hub import load_processor
from cald_speech.tasks.processors import tokenizer_of
from tests.families.text import CASES, CAUSAL, ENCODERS, MAPS, each, every_map_once, tokens_and_mask
from tests.helpers import TOLERANCE, relative_error

AUTO = {
    "base": AutoModel,
    "lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
}
INNER_WIDTH = {
    "distilbert": "hidden_dim",
    "gpt2": "n_inner",
}  # what configs call it that is intermediate_size elsewhere
WITH_POOLER = {name: case for name, case in ENCODERS.items() if name in ("bert", "roberta", "xlm-roberta")}
every_case = pytest.mark.parametrize("case", each(CASES))
every_head = pytest.mark.parametrize(
    ("case", "head"),
    each({f"{name} {head}": (case, head) for name, case in CASES.items() for head in case.family.classes}),
)
CONVERTED = {
    f"{name} {head}": (case, chosen, head)
    for name, (case, chosen) in every_map_once(CASES, [name for name in MAPS if name != "kept"]).items()
    for head in case.family.classes
}
every_converted_head = pytest.mark.parametrize(("case", "chosen", "head"), each(CONVERTED))


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    tokens, mask = tokens_and_mask(pad=model.config.pad_token_id)
    return model(tokens, attention_mask=mask)[0]


def loaded_by_every_way(folder, head, **options):
    yield AUTO[head].from_pretrained(folder, **options)
    yield cald_speech.from_pretrained(folder, head=head, **options)


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def renamed(old: str, new: str):
    return lambda weights: {name.replace(old, new): v for name, v in weights.items()}


# --- converted -------------------------------------------------------------------------------------------------------


@every_converted_head
def test_converted_saved_and_loaded_to_the_bit(case, chosen, head, tmp_path):
    model = case.converted(chosen, head)
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    for loaded in loaded_by_every_way(tmp_path, head):
        assert type(loaded) is type(model) and type(loaded).__name__ == f"Cald{case.family.classes[head].__name__}"
        assert loaded.config.model_type == f"cald_{case.family.model_type}" and not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(outputs(loaded), expected)


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16], ids=["saved float32", "saved bfloat16"])
@every_head
def test_bfloat16_to_the_bit_with_decays_in_float32(case, head, saved_as, tmp_path):
    model = case.converted("middle kept", head)
    exact = {n: p.clone() for n, p in model.named_parameters() if n.endswith((".A_log", ".dt_bias", ".D"))}
    assert len(exact) == (6 if case.family.causal else 12)
    rotary = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.to(saved_as).save_pretrained(tmp_path)
    model.to(torch.bfloat16)
    # Rotary frequencies are no weights: loading makes them anew in float32, and .to() would have rounded them.
    for name, buffer in rotary.items():
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, buffer)
    expected = outputs(model)
    assert expected.dtype == torch.bfloat16
    for loaded in loaded_by_every_way(tmp_path, head, dtype=torch.bfloat16):
        for name, p in loaded.named_parameters():
            assert p.dtype == (torch.float32 if name in exact else torch.bfloat16), name
        assert all(torch.equal(loaded.get_parameter(name), p) for name, p in exact.items())
        assert torch.equal(outputs(loaded), expected)


@every_case
def test_bfloat16_is_near_float32(case):
    model = case.converted("all converted", "base")
    expected = outputs(model)[0]  # no padding in the first row
    assert relative_error(outputs(model.to(torch.bfloat16))[0], expected) <= TOLERANCE["bfloat16 layer"]


@every_head
def test_saved_again_it_is_the_same_folder(case, head, tmp_path):
    case.converted("middle kept", head).save_pretrained(tmp_path / "first")
    cald_speech.from_pretrained(tmp_path / "first", head=head).save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", each(CAUSAL))
def test_embeddings_tied_to_the_head_stay_tied(case, tied, tmp_path):
    model = case.converted("all converted", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = cald_speech.from_pretrained(tmp_path, head="lm")
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert torch.equal(outputs(loaded), outputs(model))


# --- unconverted -----------------------------------------------------------------------------------------------------


@every_head
def test_unconverted_saved_and_loaded_to_the_bit(case, head, tmp_path):
    model = case.model(head)
    model.save_pretrained(tmp_path)
    loaded = cald_speech.from_pretrained(tmp_path, head=head)
    assert type(loaded) is case.family.classes[head]
    assert torch.equal(outputs(loaded), outputs(model))


@every_head
def test_a_pretrained_model_gets_another_head(case, head, tmp_path):
    pretrained = case.model()
    pretrained.save_pretrained(tmp_path)
    model = cald_speech.from_pretrained(tmp_path, head=head)
    ours, theirs = model.base_model.state_dict(), pretrained.base_model.state_dict()
    assert all(torch.equal(ours[name], v) for name, v in theirs.items())


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
@every_case
def test_anything_else_missing_or_left_over_is_named(case, kind, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    name = next(
        n
        for n in model.state_dict()
        if ("1." in n and ("mlp" in n or "ffn" in n)) or "layer.1.output.dense.weight" in n
    )
    edit_weights(
        tmp_path,
        lambda w: (
            {n: v for n, v in w.items() if n != name} if kind == "missing" else {**w, f"{name}.mixer": torch.ones(2)}
        ),
    )
    with pytest.raises(UserError, match=f"1 {kind} \\({name}"):
        case.family.load(str(tmp_path))


@every_case
def test_another_width_is_named(case, tmp_path):
    case.model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"of another size \(.*64.* for .*48"):
        case.family.load(str(tmp_path), **{INNER_WIDTH.get(case.family.model_type, "intermediate_size"): 48})


@every_case
def test_a_head_that_the_family_lacks(case, tmp_path):
    case.model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"head: expected one of base, \w+, classification, .* got 'ctc'"):
        cald_speech.from_pretrained(tmp_path)


# --- names as on the hub ---------------------------------------------------------------------------------------------


def test_pythias_names(tmp_path):
    """Its files have the head as embed_out, and the masks and rotary frequencies that transformers once saved."""
    case = CASES["gpt_neox"]
    model = case.model()
    model.save_pretrained(tmp_path)
    buffers = {
        "bias": torch.ones(1, 1, 64, 64),
        "masked_bias": torch.tensor(-1e9),
        "rotary_emb.inv_freq": torch.ones(2),
    }
    old = {f"gpt_neox.layers.{i}.attention.{name}": v.clone() for i in range(3) for name, v in buffers.items()}
    edit_weights(tmp_path, lambda weights: {**renamed("lm_head", "embed_out")(weights), **old})
    assert torch.equal(outputs(case.family.load(str(tmp_path)).eval()), outputs(model))


def test_llamas_names(tmp_path):
    case = CASES["llama"]
    model = case.model()
    model.save_pretrained(tmp_path)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    edit_weights(tmp_path, lambda weights: {**weights, **old})
    assert torch.equal(outputs(case.family.load(str(tmp_path)).eval()), outputs(model))


@pytest.mark.parametrize("head", ["base", "masked_lm", "classification"])
def test_robertas_names(head, tmp_path):
    """Its file has the masked-LM head, the pooler, and the positions that transformers once saved."""
    case = CASES["roberta"]
    whole, model = case.model("base", seed=1), case.model()
    model.save_pretrained(tmp_path)
    old = {
        "roberta.embeddings.position_ids": torch.arange(64)[None],
        **{f"roberta.{name}": v.clone() for name, v in whole.state_dict().items() if name.startswith("pooler.")},
    }
    edit_weights(tmp_path, lambda weights: {**weights, **old})
    loaded = cald_speech.from_pretrained(tmp_path, head=head)
    theirs = model.base_model.state_dict()
    assert all(torch.equal(loaded.base_model.state_dict()[name], v) for name, v in theirs.items())
    if head == "base":
        assert torch.equal(loaded.pooler.dense.weight, old["roberta.pooler.dense.weight"])


@pytest.mark.parametrize("head", ["base", "masked_lm", "classification"])
def test_berts_names(head, tmp_path):
    """Its file has both of pretraining's heads, and norms whose weights are called gamma and beta."""
    case = CASES["bert"]
    torch.manual_seed(0)
    pretrained = BertForPreTraining(case.config())
    pretrained.save_pretrained(tmp_path)
    edit_weights(
        tmp_path,
        lambda weights: (
            {
                n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
                for n, v in weights.items()
            }
            | {"bert.embeddings.position_ids": torch.arange(64)[None]}
        ),
    )
    loaded = cald_speech.from_pretrained(tmp_path, head=head)
    expected = pretrained.bert.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in loaded.base_model.state_dict().items())


@pytest.mark.parametrize("case", each(WITH_POOLER))
def test_an_encoders_base_may_lack_a_pooler(case, tmp_path):
    case.model().save_pretrained(tmp_path)  # a masked-LM model has none
    assert cald_speech.from_pretrained(tmp_path, head="base").pooler is not None


@every_case
def test_a_model_without_a_tokenizer_has_none(case, tmp_path):
    """transformers makes one without a vocabulary of some families' configs, to which every word is unknown."""
    case.model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expected a tokenizer in one of .*Give one with --processor"):
        tokenizer_of([str(tmp_path)], None)
    with pytest.raises(UserError, match=r"expected (a tokenizer|the processor)'s files"):
        load_processor(tmp_path)
