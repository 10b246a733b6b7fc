"""What every speech family promises, of those that hear features; test_in_short.py says it of the others."""

import copy
import json
from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCTC,
    ParakeetFeatureExtractor,
    ParakeetProcessor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertProcessor,
    pipeline,
)

import cald_speech
from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.data.text import make_processor
from cald_speech.errors import UserError
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.families import families
from cald_speech.families.features import heard
from cald_speech.families.front_end import SharedMasks
from cald_speech.families.hub import load_processor
from cald_speech.longform import AudioSource, front_end, stream_logits
from cald_speech.longform.encoder import BlockSizes
from cald_speech.longform.recogniser import Recogniser
from cald_speech.mixers import Bidirectional, Mamba2, WindowedAttention
from cald_speech.tasks.ctc import CTC
from cald_speech.tasks.processors import feature_extractor
from cald_speech.tasks.reading import whole as in_one_pass
from tests.families.contract import captured_layers, check_opened_layers, trained
from tests.families.test_vocabulary import subword_tokenizer
from tests.helpers import TOLERANCE, gradients, parakeet_config, relative_error
from tests.training.conftest import corpus, experiment, start, teachers
from tests.training.miniature import LETTERS

__all__ = ["corpus", "experiment", "start", "teachers"]

BERT, PARAKEET = families()["wav2vec2-bert"], families()["parakeet_ctc"]
PARTIAL = LayerMap(Bidirectional, {1: None, 2: Mamba2})
WINDOWED = LayerMap(partial(WindowedAttention, window=3, distance_keys=True), {2: Mamba2})
LENGTHS = (31, 5, 18)
DROPOUTS = ("hidden_dropout", "activation_dropout", "attention_dropout", "conformer_conv_dropout", "final_dropout")
CHANNELS = {BERT: 160, PARAKEET: parakeet_config().encoder_config.num_mel_bins}  # of the model's features
# Positions of wav2vec2-BERT, whose published kind is relative_key.
MODELS = {str(p): (BERT, {"position_embeddings_type": p}) for p in ("relative_key", "relative", "rotary", None)}
MODELS["parakeet"] = (PARAKEET, {})
OTHER_FRONT_END = {"subsampling_conv_kernel_size": 5, "subsampling_factor": 4}
PUBLISHED = {name: MODELS[name] for name in ("relative_key", "parakeet")}

every_model = pytest.mark.parametrize(("family", "options"), MODELS.values(), ids=MODELS)
every_family = pytest.mark.parametrize("family", [BERT, PARAKEET], ids=lambda family: family.model_type)


def tiny(family, **options):
    torch.manual_seed(0)
    return family.load(parakeet_config(**options) if family is PARAKEET else tiny_bert(**options)).eval()


def tiny_bert(**options):
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
        "mask_time_prob": 0.0,
        **dict.fromkeys(DROPOUTS, 0.0),
    }
    return BERT.config_class(**(defaults | options))


def batch(family, lengths=LENGTHS):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*mask.shape, CHANNELS[family], generator=generator) * mask[..., None], mask


def converted(family, layer_map=PARTIAL, **options):
    model = tiny(family, **options)
    keyed = layer_map is not WINDOWED or options.get("position_embeddings_type", "relative") not in ("rotary", None)
    convert(model, layer_map, initialise="attention" if keyed else "random")
    return model.eval()


def extractor_of(family):
    if family is PARAKEET:
        return ParakeetFeatureExtractor(feature_size=CHANNELS[PARAKEET])
    return SeamlessM4TFeatureExtractor()


def features_of(family, samples):
    found = extractor_of(family)(samples.numpy(), sampling_rate=16_000, return_tensors="pt")
    return found.input_features[:, : found.attention_mask.sum()]


@every_model
@torch.no_grad()
def test_without_mixers_it_is_hugging_faces(family, options):
    model = tiny(family, **options)
    twin = family.classes["ctc"](copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    convert(model, LayerMap())
    x, mask = batch(family)
    assert torch.equal(model(x).logits, twin(x).logits)
    ours, theirs = (m(x, attention_mask=mask).logits for m in (model, twin))
    for row, length in enumerate(family.frame_lengths(torch.tensor(LENGTHS), model.config).tolist()):
        assert relative_error(ours[row, :length], theirs[row, :length]) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("layer_map", [PARTIAL, WINDOWED], ids=["partial", "windowed"])
@every_model
def test_padded_is_alone_and_trains(family, options, layer_map):
    model = converted(family, layer_map, **options)
    x, mask = batch(family)
    x = x + 9.0 * (1 - mask)[..., None]  # what stands in the padding is not heard
    with torch.no_grad():
        with captured_layers(model, family) as states:
            logits = model(x, attention_mask=mask).logits
        check_opened_layers(model, family, layer_map, states)
        turned = model(x.flip(0), attention_mask=mask.flip(0)).logits.flip(0)
        for row, length in enumerate(LENGTHS):
            alone = model(x[row : row + 1, :length]).logits[0]
            for got in (logits, turned):
                assert relative_error(got[row, : len(alone)], alone) <= TOLERANCE["rounding"]
    model.train()(x, attention_mask=mask).logits[0].square().sum().backward()
    found = gradients(model)
    assert found.keys() == trained(model) and all(g.isfinite().all() for g in found.values())


# Whole and half windows at the end, and one frame alone, in the published models.
@pytest.mark.parametrize(
    ("family", "options", "num_samples"),
    [(*m, 12_011) for m in (*MODELS.values(), (PARAKEET, OTHER_FRONT_END))]
    + [(*m, n) for m in PUBLISHED.values() for n in (12_160, 720, 560)],
)
@torch.no_grad()
def test_saved_loaded_and_long(family, options, num_samples, tmp_path, monkeypatch):
    model = converted(family, **options)
    model.save_pretrained(tmp_path)
    samples = 0.1 * torch.randn(num_samples)
    x = features_of(family, samples)
    expected = model(x).logits
    for loaded in (AutoModelForCTC.from_pretrained(tmp_path).eval(), cald_speech.from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert all(torch.equal(v, model.state_dict()[name]) for name, v in loaded.state_dict().items())
        assert relative_error(loaded(x).logits, expected) <= TOLERANCE["rounding"]
    loaded(*batch(family))
    monkeypatch.setattr(front_end, "SAMPLES_PER_READ", 1000)
    for sizes in ((50, 2048, 512), (3, 7, 5), (1, 1, 1)):
        monkeypatch.setattr(BlockSizes, "of", lambda *_, sizes=sizes: BlockSizes(*sizes))
        got = torch.cat([logits for _, logits in stream_logits(loaded, AudioSource.from_samples(samples))])
        # One frame's features are normalised by the difference of two, whose rounding they are made of.
        assert relative_error(got, expected[0]) <= TOLERANCE["parity" if num_samples < 1000 else "rounding"]


def write_teacher(family, folder):
    """A model and its processor: the blank is the first output of one family, and the last one of the other."""
    if family is PARAKEET:
        tokenizer = subword_tokenizer([LETTERS.lower(), LETTERS])
        processor = ParakeetProcessor(extractor_of(family), tokenizer)
    else:
        processor = Wav2Vec2BertProcessor(extractor_of(family), make_processor(folder, [LETTERS]).tokenizer)
    processor.save_pretrained(folder)
    tokenizer = processor.tokenizer
    model = tiny(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():  # so that it says this and that
        family.head(model).weight.mul_(20.0)
        for p in getattr(family.base(model), "subsampling", torch.nn.Identity()).parameters():
            p.mul_(20.0)
        family.head(model).bias[tokenizer.unk_token_id] = -1e4
    model.save_pretrained(folder)
    return processor


@pytest.mark.parametrize("keys", [{}, {"join_utterances": 2}], ids=["plain", "joined"])
@every_family
def test_trained_evaluated_and_read(family, keys, experiment, start, tmp_path):
    teacher = tmp_path / "teacher"
    processor = write_teacher(family, teacher)
    path = experiment(teacher=str(teacher), guidance="hybrid", switch_step=2, align_steps=1, num_steps=4, **keys)
    if keys:
        with pytest.raises(UserError, match="this model hears features: expected join_utterances: 1"):
            start(path)
        return
    assert start(path).settings.task.blank == processor.tokenizer.pad_token_id
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == f"cald_{family.model_type}"
    assert type(load_processor(model)) is type(processor)
    manifest = next((tmp_path / "data").rglob("*valid*.json"))
    assert evaluate_folder(model, manifest, tmp_path / "report", split="valid", progress=False)["wer"] >= 0
    samples = torch.randn(40_000) * torch.rand(10).square().repeat_interleave(4000)
    recogniser = Recogniser.of(model)
    words = recogniser.transcribe(AudioSource.from_samples(samples))
    read = in_one_pass(from_pretrained(model), load_processor(model))
    assert [word.text for word in words] == read(samples).split() != []
    aligned = recogniser.align(samples, "AB cde B" if family is PARAKEET else "AB CDE B")
    assert [word.text.upper() for word in aligned] == ["AB", "CDE", "B"]
    asr = pipeline("automatic-speech-recognition", model=str(model))
    clips = [samples.numpy(), samples[:9_000].numpy()]
    assert [found["text"] for found in asr(clips, batch_size=2)] == [read(torch.tensor(clip)) for clip in clips]


def test_fine_tuned_from_an_encoder_without_a_tokenizer(experiment, start, tmp_path):
    source = tmp_path / "source"
    tiny(BERT).base_model.save_pretrained(source)
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
    config = tiny_bert(num_labels=3)
    model = BERT.load(config, model_class=BERT.class_with("classification"))
    convert(model, PARTIAL)
    model.save_pretrained(tmp_path)
    SeamlessM4TFeatureExtractor().save_pretrained(tmp_path)
    assert type(feature_extractor([str(tmp_path)], None)) is SeamlessM4TFeatureExtractor
    loaded = from_pretrained(tmp_path, head="classification")
    x, mask = batch(BERT)
    with torch.no_grad():
        together = loaded(x, attention_mask=mask).logits
        for row, length in enumerate(LENGTHS):
            alone = loaded(x[row : row + 1, :length]).logits[0]
            assert relative_error(together[row], alone) <= TOLERANCE["rounding"]


def test_an_adapter_is_refused_and_its_encoder_fine_tuned_anew(experiment, start, tmp_path):
    with pytest.raises(UserError, match="add_adapter in its config"):
        tiny(BERT, add_adapter=True, output_hidden_size=32)
    source, keys = tmp_path / "source", {"guidance": "unguided", "num_steps": 1, "teacher": None, "alpha_logits": None}
    BERT.classes["base"](tiny_bert(add_adapter=True, output_hidden_size=32)).save_pretrained(source)
    SeamlessM4TFeatureExtractor().save_pretrained(source)
    with pytest.raises(UserError, match=r"model_overrides: \{add_adapter: False\}"):
        start(experiment(convert=False, source=str(source), **keys))
    start(experiment(convert=False, source=str(source), model_overrides={"add_adapter": False}, **keys))
    assert not json.loads((tmp_path / "run" / "model" / "config.json").read_text())["add_adapter"]


def test_audio_of_one_frame_of_features():
    """Parakeet's extractor divides by a variance that one frame has not; long form takes it as 0."""
    extractor = extractor_of(PARAKEET)
    for num_samples, frames in ((100, 0), (319, 1)):
        told = rf"at least two frames of features, got {num_samples} samples, which are {frames}\. .*silence"
        with pytest.raises(UserError, match=told):
            heard(extractor, torch.randn(num_samples))
    assert heard(extractor, torch.randn(320)).isfinite().all()
    ((_, logits),) = stream_logits(converted(PARAKEET), AudioSource.from_samples(torch.randn(319)))
    assert logits.shape[0] == 1 and logits.isfinite().all()


def test_what_parakeet_has_not_is_refused():
    config = parakeet_config()
    model = PARAKEET.load(config, mask_time_prob=0, dropout=0.2, pad_token_id=3)
    assert (model.config.encoder_config.dropout, model.encoder.dropout, model.config.pad_token_id) == (0.2, 0.2, 3)
    assert config.encoder_config.dropout == 0.0 and model.encoder.layerdrop == 0.0
    with pytest.raises(UserError, match=r"no SpecAugment: expected mask_time_prob to be 0, .*got 0.1"):
        PARAKEET.load(config, mask_time_prob=0.1)
    with pytest.raises(UserError, match=r"expected what parakeet_ctc models have, .*got hidden_dropout"):
        PARAKEET.load(config, hidden_dropout=0.1)
    with pytest.raises(UserError, match="teacher_mask: expected none"):
        SharedMasks(model, model)


def test_the_sizes_of_a_part_are_looked_at(tmp_path):
    write_teacher(PARAKEET, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["encoder_config"]["num_hidden_layers"] = 10**9
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"encoder_config\.num_hidden_layers: expected a number from 1 to 1,024"):
        from_pretrained(tmp_path)


@every_family
def test_another_blank_or_other_features_are_refused(family, tmp_path):
    processor = write_teacher(family, tmp_path)
    blank = processor.tokenizer.pad_token_id
    with pytest.raises(UserError, match=f"blank: expected {blank}, the tokenizer's padding token, .*got 2"):
        CTC(blank=2).processor([str(tmp_path)], None, tmp_path, tmp_path, "none")
    name = "hop_length" if family is PARAKEET else "stride"
    setattr(processor.feature_extractor, name, 80)
    with pytest.raises(UserError, match=rf"expected the features that .* with {name}: 80 \(expected"):
        Recogniser.of(from_pretrained(tmp_path), processor, force=True)
