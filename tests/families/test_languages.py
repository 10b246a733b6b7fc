"""MMS: one model, an adapter, a head and a vocabulary for each language, wherever a model comes in."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Processor

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.errors import UserError
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.families.hub import load_processor
from cald_speech.longform.recogniser import Recogniser
from cald_speech.mixers import Bidirectional
from cald_speech.training.models import build_models
from cald_speech.training.settings import Settings
from tests.commands.conftest import call
from tests.evaluation.layerwise import write_recordings
from tests.helpers import SPEECH, audio_batch, tiny_config, tiny_model

__all__ = ["call"]

LETTERS = {"eng": "ABC", "fra": "ABCÉÇ"}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "|")
FAMILY = SPEECH["wav2vec2"]


@pytest.fixture(scope="module")
def mms(tmp_path_factory):
    """A model of two languages, in the files that an MMS checkpoint has; its own weights are English."""
    folder = tmp_path_factory.mktemp("mms")
    vocabulary = {
        name: {token: place for place, token in enumerate((*SPECIAL, *letters))} for name, letters in LETTERS.items()
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True)
    tokenizer = Wav2Vec2CTCTokenizer(folder / "vocab.json", target_lang="eng")
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    for seed, (name, tokens) in enumerate(vocabulary.items()):
        torch.manual_seed(seed)
        model = Wav2Vec2ForCTC(tiny_config(FAMILY, layers=2, adapter_attn_dim=4, vocab_size=len(tokens)))
        torch.nn.init.normal_(model.lm_head.weight, std=5.0)
        save_file({k: v.contiguous() for k, v in model._get_adapters().items()}, folder / f"adapter.{name}.safetensors")
        if name == "eng":
            model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model(audio_batch((6000,))[0]).logits


def test_a_language_is_what_hugging_face_makes_of_it(mms):
    for language, letters in LETTERS.items():
        model = from_pretrained(mms, target_lang=language)
        theirs = Wav2Vec2ForCTC.from_pretrained(mms, target_lang=language, ignore_mismatched_sizes=True).eval()
        assert torch.equal(logits(model), logits(theirs))
        assert model.config.vocab_size == len(load_processor(mms, language).tokenizer) == len(SPECIAL) + len(letters)
    assert torch.equal(logits(from_pretrained(mms)), logits(from_pretrained(mms, target_lang="eng")))


def test_a_converted_model_is_of_one_language(mms, call, tmp_path):
    call("convert", mms, tmp_path / "new", "--target_lang", "fra", "--initialise", "random")
    for given in (None, "fra"):
        model, processor = from_pretrained(tmp_path / "new", target_lang=given), load_processor(tmp_path / "new", given)
        assert type(model).__name__ == "CaldWav2Vec2ForCTC" and processor.tokenizer.target_lang == "fra"
        assert model.lm_head.out_features == len(processor.tokenizer)
        assert torch.equal(model.lm_head.weight, from_pretrained(mms, target_lang="fra").lm_head.weight)
    with pytest.raises(UserError, match="target_lang: expected one of fra, got 'eng'"):
        from_pretrained(tmp_path / "new", target_lang="eng")


def test_what_is_trained_is_not_read_over(mms):
    model = from_pretrained(mms, target_lang="fra")
    convert(model, LayerMap(Bidirectional))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.tie_weights()
    assert not model.lm_head.weight.any()


def test_recognised_and_evaluated(mms, tmp_path):
    assert "É" in Recogniser.of(mms, force=True, target_lang="fra").vocabulary.tokens
    assert "É" not in Recogniser.of(mms, force=True).vocabulary.tokens
    manifest = write_recordings(tmp_path, mms)
    how = {"split": "test", "normaliser": "none", "progress": False}
    for language in (None, "fra"):
        summary = evaluate_folder(mms, manifest, tmp_path / str(language), target_lang=language, **how)
        assert (summary["wer"] == 0) == (language is None)  # the texts are what the English model says


@pytest.mark.parametrize("language", ["eng", "fra"])
def test_a_student_and_its_teacher_speak_it(mms, tmp_path, language):
    yaml = tmp_path / "student.yaml"
    text = f"output_folder: {tmp_path}\nteacher: {mms}\nguidance: target\ntarget_lang: {language}\n"
    yaml.write_text(
        text + "layer_map: !new:cald_speech.conversion.LayerMap {default: !name:cald_speech.mixers.Mamba2 }"
    )
    made = build_models(Settings.load(yaml), tmp_path / "no manifest is read")
    expected = from_pretrained(mms, target_lang=language).lm_head.weight
    assert torch.equal(made.student.lm_head.weight, expected) and torch.equal(made.teacher.lm_head.weight, expected)
    assert made.processor.tokenizer.target_lang == language
    assert made.student.config.vocab_size == len(made.processor.tokenizer)


def test_a_language_that_there_is_not(mms, tmp_path, call):
    for attempt in (from_pretrained, load_processor):
        with pytest.raises(UserError, match="target_lang: expected one of eng, fra, got 'deu'"):
            attempt(mms, target_lang="deu")
    told = call("convert", mms, tmp_path / "new", "--target_lang", "deu", status=2).stderr
    assert "expected one of eng, fra, got 'deu'" in told and not (tmp_path / "new").exists()
    partial = shutil.copytree(mms, tmp_path / "partial")
    (partial / "adapter.fra.safetensors").unlink()
    with pytest.raises(UserError, match="target_lang: expected one of eng, got 'fra'"):
        from_pretrained(partial, target_lang="fra")
    (partial / "adapter.eng.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"the adapter of 'eng' in .* cannot be loaded"):
        from_pretrained(partial, target_lang="eng")


def test_a_model_of_one_language(tmp_path):
    tiny_model(FAMILY, layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"target_lang: .* has none\. Leave target_lang out, got 'fra'"):
        from_pretrained(tmp_path, target_lang="fra")
