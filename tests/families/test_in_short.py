"""What every speech family promises, once each, for those whose full matrices run in `make test-all` alone.

test_contract.py says more of each promise.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCTC

import cald_speech
from cald_speech import LayerMap, convert
from cald_speech.longform import AudioSource, stream_logits
from cald_speech.longform.encoder import BlockSizes
from cald_speech.mixers import Bidirectional, Mamba2
from tests.families.contract import captured_layers, check_opened_layers, trained
from tests.helpers import SPEECH, TOLERANCE, USUAL, audio_batch, gradients, one_frame, relative_error, tiny_model

CONFORMER = SPEECH["wav2vec2-conformer"]
OTHERS = {name: (family, {}) for name, family in SPEECH.items() if name not in USUAL} | {
    "conformer, rotary": (CONFORMER, {"position_embeddings_type": "rotary"}),
    "sew, by threes": (SPEECH["sew"], {"squeeze_factor": 3, "num_conv_pos_embeddings": 15}),
    "conformer without positions": (CONFORMER, {"position_embeddings_type": None}),
}
PARTIAL = LayerMap(Bidirectional, {1: None, 2: Mamba2})

every_other = pytest.mark.parametrize(("family", "options"), OTHERS.values(), ids=OTHERS)


def converted(family, options, norm="group"):
    model = tiny_model(family, norm, **options)
    convert(model, PARTIAL)
    return model.eval()


@every_other
@torch.no_grad()
def test_without_mixers_it_is_hugging_faces(family, options):
    model = tiny_model(family, "group", **options)
    twin = family.classes["ctc"](copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    convert(model, LayerMap())
    audio, mask = audio_batch((6000, 5000))
    assert torch.equal(model(audio).logits, twin(audio).logits)
    frames = model._get_feat_extract_output_lengths(5000)
    padded = model(audio, attention_mask=mask).logits[1, :frames]
    assert relative_error(padded, twin(audio[1:, :5000]).logits[0]) <= TOLERANCE["rounding"]


@every_other
def test_padded_is_alone_in_every_order_and_trains(family, options):
    model = converted(family, options)
    samples = (6000, one_frame(model), 4321)
    audio, mask = audio_batch(samples)
    with torch.no_grad():
        with captured_layers(model, family) as states:
            logits = model(audio, attention_mask=mask).logits
        check_opened_layers(model, family, PARTIAL, states)
        turned = model(audio.flip(0), attention_mask=mask.flip(0)).logits.flip(0)
        frames = model._get_feat_extract_output_lengths(mask.sum(-1)).tolist()
        for row, (size, length) in enumerate(zip(samples, frames, strict=True)):
            alone = model(audio[row : row + 1, :size]).logits[0]
            for got in (logits, turned):
                assert relative_error(got[row, :length], alone) <= TOLERANCE["rounding"]
    model.train()(audio, attention_mask=mask).logits[0].square().sum().backward()
    found = gradients(model)
    assert found.keys() == trained(model) and all(g.isfinite().all() for g in found.values())


@every_other
@torch.no_grad()
def test_saved_loaded_and_long(family, options, tmp_path, monkeypatch):
    model = converted(family, options)
    model.save_pretrained(tmp_path)
    audio, mask = audio_batch((6000, 12_011))
    expected = model(audio, attention_mask=mask).logits
    for loaded in (AutoModelForCTC.from_pretrained(tmp_path).eval(), cald_speech.from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert torch.equal(loaded(audio, attention_mask=mask).logits, expected)
    for sizes in ((50, 2048, 512), (3, 7, 5)):
        monkeypatch.setattr(BlockSizes, "of", lambda *_, sizes=sizes: BlockSizes(*sizes))
        parts = stream_logits(loaded, AudioSource.from_samples(audio[1]), do_normalize=False)
        assert relative_error(torch.cat([logits for _, logits in parts]), expected[1]) <= TOLERANCE["rounding"]


@every_other
def test_an_encoders_file_and_a_models_are_read_for_either(family, options, tmp_path):
    model = tiny_model(family, "layer", **options)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "encoder")
    for head, place in (("base", "whole"), ("ctc", "encoder")):
        encoder = cald_speech.from_pretrained(tmp_path / place, head=head).base_model
        expected = model.base_model.state_dict()
        assert all(torch.equal(v, expected[name]) for name, v in encoder.state_dict().items())
