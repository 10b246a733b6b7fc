"""Which checkpoints load: only a head may be missing, and only what pretraining alone needed may be left over."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2ForPreTraining

from cald_speech.errors import UserError
from tests.helpers import SPEECH, tiny_config, tiny_model

FAMILIES = SPEECH
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
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


@every_family
def test_spec_augments_vector_may_be_missing_or_left_over(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "without")
    tiny_model(family, mask_time_prob=0.1).save_pretrained(tmp_path / "with")
    assert "masked_spec_embed" in dict(
        family.load(str(tmp_path / "without"), mask_time_prob=0.1).base_model.named_parameters()
    )
    assert "masked_spec_embed" not in dict(
        family.load(str(tmp_path / "with"), mask_time_prob=0.0).base_model.named_parameters()
    )


@every_family
def test_anything_else_missing_is_named(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    name = f"{family.model_type}.encoder.layers.1.attention.k_proj.weight"
    edit_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=rf"1 missing \({name}"):
        family.load(str(tmp_path))


@every_family
def test_anything_else_left_over_is_named(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    name = f"{family.model_type}.encoder.layers.1.attention.mixer.in_proj.weight"
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
    with pytest.raises(
        UserError, match=rf"(?s)cannot load the model '{source}'.*config.json and model.safetensors.*network"
    ):
        family.load(source)
