"""Which checkpoints load: only a head may be missing, and only what pretraining alone needed may be left over."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2ForPreTraining

from cald_speech.errors import UserError
from tests.helpers import SPEECH, SPEECH_CASES, names_in_attention, prefix, tiny_config, tiny_model

FAMILIES = SPEECH
every_family = pytest.mark.parametrize("family", SPEECH_CASES)
both_norms = pytest.mark.parametrize("norm", ["group", "layer"])


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@both_norms
@every_family
def test_saved_and_loaded_to_the_bit(family, norm, tmp_path):
    model = tiny_model(family, norm)
    model.save_pretrained(tmp_path)
    loaded = family.load(str(tmp_path))
    assert type(loaded) is family.classes["ctc"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[name]) for name, v in loaded.state_dict().items())


@both_norms
@every_family
def test_an_encoder_without_head_gets_a_new_head(family, norm, tmp_path):
    encoder = tiny_model(family, norm).base_model
    encoder.save_pretrained(tmp_path)
    model = family.load(str(tmp_path), vocab_size=11)
    assert model.lm_head.weight.shape == (11, 32)
    loaded = model.base_model.state_dict()
    assert all(torch.equal(v, loaded[name]) for name, v in encoder.state_dict().items())


@both_norms
def test_what_pretraining_alone_needed_may_be_left_over(norm, tmp_path):
    family = FAMILIES["wav2vec2"]
    config = tiny_config(family, norm, codevector_dim=8, proj_codevector_dim=8, num_codevectors_per_group=4)
    pretrained = Wav2Vec2ForPreTraining(config)
    pretrained.save_pretrained(tmp_path)
    assert any(name.startswith("quantizer.") for name in load_file(tmp_path / "model.safetensors"))
    model = family.load(str(tmp_path))
    expected = pretrained.wav2vec2.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in model.wav2vec2.state_dict().items())


# --- names as on the hub ---------------------------------------------------------------------------------------------

# What only pretraining needed, in the files of each family: quantiser and projections, label embeddings, mask vector.
LEFT_OVER = {
    "wav2vec2": [
        "quantizer.codevectors",
        "quantizer.weight_proj.weight",
        "quantizer.weight_proj.bias",
        "project_q.weight",
        "project_q.bias",
        "project_hid.weight",
        "project_hid.bias",
    ],
    "hubert": ["label_embs_concat", "final_proj.weight", "final_proj.bias", "mask_emb"],
    "data2vec-audio": [],
    "unispeech": ["quantizer.codevectors", "project_q.weight", "project_hid.bias", "ctc_proj.weight", "ctc_proj.bias"],
    "unispeech-sat": [
        "quantizer.codevectors",
        "project_hid.weight",
        "speaker_proj.weight",
        "label_embeddings_concat",
        "layer_norm_for_extract.weight",
    ],
    "sew": ["quantizer.codevectors", "project_q.weight", "project_hid.weight"],
    "wav2vec2-conformer": ["quantizer.codevectors", "project_q.weight", "project_hid.weight"],
    "wavlm": ["label_embs_concat", "final_proj.weight", "final_proj.bias", "mask_emb"],
}
# Weight normalisation was once a hook of its own; its two parameters have other names since.
OLD_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
PLAIN = [FAMILIES["data2vec-audio"]]  # whose positional convolutions have no weight normalisation


def write_as_on_the_hub(folder, family, norm="layer", *, begin=""):
    """A self-supervised encoder in a folder, with the old names and what pretraining left; returns the encoder."""
    encoder = tiny_model(family, norm).base_model
    encoder.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights = {}
    for name, v in encoder.state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        weights[begin + name] = v.clone()
    assert sum(name.endswith((".weight_g", ".weight_v")) for name in weights) == (0 if family in PLAIN else 2)
    weights |= {name: torch.ones(2) for name in LEFT_OVER[family.model_type]}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return encoder


# The names' prefix, the head and the norm are read apart from each other: each value with each family, and each head
# with and without the prefix.
HUB_FILES = [
    ("ctc", True, "layer"),
    ("ctc", False, "group"),
    ("base", True, "layer"),
    ("base", False, "group"),
    ("classification", True, "group"),
    ("classification", False, "layer"),
]


@pytest.mark.parametrize(
    ("head", "of_pretraining", "norm"),
    HUB_FILES,
    ids=[f"{head} {'of pretraining' if of else 'of the encoder alone'}" for head, of, *_ in HUB_FILES],
)
@every_family
def test_a_self_supervised_checkpoint_under_its_old_names(family, norm, head, of_pretraining, tmp_path):
    begin = f"{prefix(family)}." if of_pretraining else ""
    encoder = write_as_on_the_hub(tmp_path, family, norm, begin=begin)
    model = family.load(str(tmp_path), model_class=family.class_with(head))
    loaded = model.base_model.state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(v, loaded[name]) for name, v in encoder.state_dict().items())
    heads = {name.split(".")[0] for name, _ in model.named_parameters()} - {name.split(".")[0] for name in loaded}
    expected = {"base": set(), "ctc": {"lm_head"}, "classification": {"projector", "classifier"}}
    assert heads - {prefix(family)} == expected[head]


@pytest.mark.parametrize("old", OLD_NAMES.values())
@pytest.mark.parametrize("family", [case for case in SPEECH_CASES if case.values[0] not in PLAIN])
def test_half_of_an_old_weight_norm_is_named(family, old, tmp_path):
    write_as_on_the_hub(tmp_path, family)
    edit_weights(tmp_path, lambda weights: weights.pop(f"encoder.pos_conv_embed.conv.{old}"))
    with pytest.raises(UserError, match=r"1 missing \(\w+\.encoder\.pos_conv_embed\.conv\.parametrizations\."):
        family.load(str(tmp_path))


@pytest.mark.parametrize("name", ["encoder.quantizer.codevectors", "my_final_proj.weight", "encoder.mask_emb"])
@every_family
def test_only_pretrainings_own_names_may_be_left_over(family, name, tmp_path):
    write_as_on_the_hub(tmp_path, family)
    edit_weights(tmp_path, lambda weights: weights.update({name: torch.ones(2)}))
    with pytest.raises(UserError, match=rf"1 unexpected \({name}"):
        family.load(str(tmp_path))


# --- what may be missing or left over --------------------------------------------------------------------------------


@every_family
def test_spec_augments_vector_may_be_missing_or_left_over(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "without")
    tiny_model(family, mask_time_prob=0.1).save_pretrained(tmp_path / "with")
    assert "masked_spec_embed" in dict(
        family.load(str(tmp_path / "without"), mask_time_prob=0.1).base_model.named_parameters()
    )
    without = family.load(str(tmp_path / "with"), mask_time_prob=0.0)
    if family.model_type != "unispeech-sat":  # which always has one
        assert "masked_spec_embed" not in dict(without.base_model.named_parameters())


@every_family
def test_anything_else_missing_is_named(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    slot, _, key, _, _ = names_in_attention(family)
    name = f"{prefix(family)}.encoder.layers.1.{slot}.{key}.weight"
    edit_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=rf"1 missing \({name}"):
        family.load(str(tmp_path))


@every_family
def test_anything_else_left_over_is_named(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    slot, *_ = names_in_attention(family)
    name = f"{prefix(family)}.encoder.layers.1.{slot}.mixer.in_proj.weight"
    edit_weights(tmp_path, lambda weights: weights.update({name: torch.ones(2, 2)}))
    with pytest.raises(UserError, match=rf"1 unexpected \({name}"):
        family.load(str(tmp_path))


@every_family
def test_another_width_is_named(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"of another size \(.*\(64, 32\) for \(48, 32\)"):
        family.load(str(tmp_path), intermediate_size=48)


def test_another_familys_checkpoint_is_refused(tmp_path):
    tiny_model(FAMILIES["wav2vec2"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"do not fit this model: .* missing \(hubert\."):
        FAMILIES["hubert"].load(str(tmp_path))


@pytest.mark.parametrize("source", ["facebook/wav2vec2-base", "/no/such/folder"], ids=["hub id offline", "no folder"])
@every_family
def test_a_source_that_cannot_be_had(family, source):
    with pytest.raises(UserError, match=rf"there is no folder '{source}', and .* folder"):
        family.load(source)
