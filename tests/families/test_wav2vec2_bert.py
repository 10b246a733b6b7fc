"""What every speech family promises, of the one that hears features; test_in_short.py says it of the others."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCTC, SeamlessM4TFeatureExtractor, Wav2Vec2BertProcessor

import cald_speech
from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.data.text import make_processor
from cald_speech.errors import UserError
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.families import families
from cald_speech.families.hub import load_processor
from cald_speech.longform import AudioSource, front_end, stream_logits
from cald_speech.longform.encoder import BlockSizes
from cald_speech.longform.recogniser import Recogniser
from cald_speech.mixers import Bidirectional, Mamba2
from cald_speech.tasks.processors import feature_extractor
from cald_speech.tasks.reading import whole as in_one_pass
from tests.families.contract import captured_layers, check_opened_layers, trained
from tests.helpers import TOLERANCE, gradients, relative_error
from tests.training.conftest import corpus, experiment, start, teachers
from tests.training.miniature import LETTERS

__all__ = ["corpus", "experiment", "start", "teachers"]

FAMILY = families()["wav2vec2-bert"]
PARTIAL = LayerMap(Bidirectional, {1: None, 2: Mamba2})
POSITIONS = ("relative_key", "relative", "rotary", None)
LENGTHS = (31, 5, 18)
DROPOUTS = ("hidden_dropout", "activation_dropout", "attention_dropout", "conformer_conv_dropout", "final_dropout")

every_position = pytest.mark.parametrize("positions", POSITIONS, ids=str)


def tiny(positions="relative_key", **options):
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_depthwise_kernel_size": 5,
        "left_max_position_embeddings": 6,
        "right_max_position_embeddings": 3,
        "max_source_positions": 20,
        "vocab_size": 32,
        "position_embeddings_type": positions,
        "mask_time_prob": 0.0,
        **dict.fromkeys(DROPOUTS, 0.0),
    }
    torch.manual_seed(0)
    return FAMILY.load(FAMILY.config_class(**(defaults | options))).eval()


def batch(lengths=LENGTHS):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randn(*mask.shape, 160, generator=torch.Generator().manual_seed(0)) * mask[..., None], mask


def converted(positions="relative_key", **options):
    model = tiny(positions, **options)
    convert(model, PARTIAL)
    return model.eval()


@every_position
@torch.no_grad()
def test_without_mixers_it_is_hugging_faces(positions):
    model = tiny(positions)
    twin = FAMILY.classes["ctc"](copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    convert(model, LayerMap())
    x, mask = batch()
    assert torch.equal(model(x).logits, twin(x).logits)
    ours, theirs = (m(x, attention_mask=mask).logits for m in (model, twin))
    for row, length in enumerate(LENGTHS):
        assert relative_error(ours[row, :length], theirs[row, :length]) <= TOLERANCE["rounding"]


@every_position
def test_padded_is_alone_and_trains(positions):
    model = converted(positions)
    x, mask = batch()
    with torch.no_grad():
        with captured_layers(model, FAMILY) as states:
            logits = model(x, attention_mask=mask).logits
        check_opened_layers(model, FAMILY, PARTIAL, states)
        turned = model(x.flip(0), attention_mask=mask.flip(0)).logits.flip(0)
        for row, length in enumerate(LENGTHS):
            alone = model(x[row : row + 1, :length]).logits[0]
            for got in (logits, turned):
                assert relative_error(got[row, :length], alone) <= TOLERANCE["rounding"]
    model.train()(x, attention_mask=mask).logits[0].square().sum().backward()
    found = gradients(model)
    assert found.keys() == trained(model) and all(g.isfinite().all() for g in found.values())


# Whole and half windows at the end, and one frame alone, in the published kind of positions.
@pytest.mark.parametrize(
    ("positions", "num_samples"),
    [*((p, 12_011) for p in POSITIONS), *(("relative_key", n) for n in (12_160, 720, 560))],
)
@torch.no_grad()
def test_saved_loaded_and_long(positions, num_samples, tmp_path, monkeypatch):
    model = converted(positions)
    model.save_pretrained(tmp_path)
    samples = 0.1 * torch.randn(num_samples)
    features = SeamlessM4TFeatureExtractor()(samples.numpy(), sampling_rate=16_000, return_tensors="pt")
    x = features.input_features[:, : features.attention_mask.sum()]
    expected = model(x).logits
    for loaded in (AutoModelForCTC.from_pretrained(tmp_path).eval(), cald_speech.from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert all(torch.equal(v, model.state_dict()[name]) for name, v in loaded.state_dict().items())
        assert relative_error(loaded(x).logits, expected) <= TOLERANCE["rounding"]
    loaded(*batch())
    monkeypatch.setattr(front_end, "SAMPLES_PER_READ", 1000)
    for sizes in ((50, 2048, 512), (3, 7, 5)):
        monkeypatch.setattr(BlockSizes, "of", lambda *_, sizes=sizes: BlockSizes(*sizes))
        got = torch.cat([logits for _, logits in stream_logits(loaded, AudioSource.from_samples(samples))])
        # One frame's features are normalised by the difference of two, whose rounding they are made of.
        assert relative_error(got, expected[0]) <= TOLERANCE["parity" if num_samples < 1000 else "rounding"]


@pytest.mark.parametrize("keys", [{}, {"join_utterances": 2}], ids=["plain", "joined"])
def test_trained_evaluated_and_read(keys, experiment, start, tmp_path):
    teacher = tmp_path / "teacher"
    tokenizer = make_processor(teacher, [LETTERS]).tokenizer
    Wav2Vec2BertProcessor(SeamlessM4TFeatureExtractor(), tokenizer).save_pretrained(teacher)
    tiny(vocab_size=len(tokenizer)).save_pretrained(teacher)
    path = experiment(teacher=str(teacher), guidance="hybrid", switch_step=2, align_steps=1, num_steps=4, **keys)
    if keys:
        with pytest.raises(UserError, match="this model hears features: expected join_utterances: 1"):
            start(path)
        return
    start(path)
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == "cald_wav2vec2-bert"
    manifest = next((tmp_path / "data").rglob("*valid*.json"))
    assert evaluate_folder(model, manifest, tmp_path / "report", split="valid", progress=False)["wer"] >= 0
    samples = torch.randn(40_000)
    words = Recogniser.of(model).transcribe(AudioSource.from_samples(samples))
    expected = in_one_pass(from_pretrained(model), load_processor(model))(samples)
    assert [word.text for word in words] == expected.split() != []


def test_fine_tuned_from_an_encoder_without_a_tokenizer(experiment, start, tmp_path):
    source = tmp_path / "source"
    tiny().base_model.save_pretrained(source)
    SeamlessM4TFeatureExtractor().save_pretrained(source)
    start(
        experiment(convert=False, teacher=None, alpha_logits=None, source=str(source), guidance="unguided", num_steps=2)
    )
    model = tmp_path / "run" / "model"
    assert type(load_processor(model).feature_extractor) is SeamlessM4TFeatureExtractor
    samples = torch.randn(9_000)
    words = Recogniser.of(model, force=True).transcribe(AudioSource.from_samples(samples))
    expected = in_one_pass(from_pretrained(model), load_processor(model))(samples)
    assert [word.text for word in words] == expected.split()


def test_classifies(tmp_path):
    """A head for classes, and its feature extractor, as the commands load them."""
    torch.manual_seed(0)
    config = tiny(num_labels=3).config
    model = FAMILY.load(config, model_class=FAMILY.class_with("classification"))
    convert(model, PARTIAL)
    model.save_pretrained(tmp_path)
    SeamlessM4TFeatureExtractor().save_pretrained(tmp_path)
    assert type(feature_extractor([str(tmp_path)], None)) is SeamlessM4TFeatureExtractor
    loaded = from_pretrained(tmp_path, head="classification")
    x, mask = batch()
    with torch.no_grad():
        together = loaded(x, attention_mask=mask).logits
        for row, length in enumerate(LENGTHS):
            alone = loaded(x[row : row + 1, :length]).logits[0]
            assert relative_error(together[row], alone) <= TOLERANCE["rounding"]


def test_an_adapter_is_refused():
    with pytest.raises(UserError, match="add_adapter in its config"):
        tiny(add_adapter=True, output_hidden_size=32)
