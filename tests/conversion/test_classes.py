"""Converted models as folders: equal to the bit after loading, by every way in; a loud failure where that cannot be."""

import copy
import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCTC,
    ElectraConfig,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    pipeline,
)

import cald_speech
from cald_speech import LayerMap, convert
from cald_speech.errors import UserError
from cald_speech.mixers import Bidirectional, Mamba2
from tests.helpers import SPEECH, SPEECH_CASES, TOLERANCE, audio_batch, relative_error, tiny_model

FAMILIES = SPEECH
SHARED = partial(Bidirectional, share_projections=True)
MAPS = {
    "all converted": LayerMap(SHARED),
    "first converted": LayerMap(None, {0: partial(Bidirectional, mixer=partial(Mamba2, d_conv=3))}),
    "first kept": LayerMap(Bidirectional, {0: None}),
}
SAMPLES = (8000, 5000, 400)
every_family = pytest.mark.parametrize("family", SPEECH_CASES)
both_norms = pytest.mark.parametrize("norm", ["group", "layer"])
every_map = pytest.mark.parametrize("layer_map", MAPS.values(), ids=MAPS)


def converted(family, norm="group", layer_map=MAPS["all converted"], **options):
    model = tiny_model(family, norm, **options)
    convert(model, layer_map)
    return model.eval()


@torch.no_grad()
def logits(model, samples=SAMPLES):
    audio, mask = audio_batch(samples)
    return model(audio.to(model.dtype), attention_mask=mask).logits


WAYS_IN = {
    "AutoModelForCTC": lambda folder, **kw: AutoModelForCTC.from_pretrained(folder, **kw).eval(),
    "cald_speech": cald_speech.from_pretrained,
}


@every_map
@both_norms
@every_family
def test_saved_and_loaded_to_the_bit(family, norm, layer_map, tmp_path):
    model = converted(family, norm, layer_map)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for load in WAYS_IN.values():
        loaded = load(tmp_path)
        assert type(loaded) is type(model) and loaded.config.layer_map == model.config.layer_map
        assert not loaded.training
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16], ids=["saved float32", "saved bfloat16"])
@both_norms
@every_family
def test_bfloat16_to_the_bit_with_decays_in_float32(family, norm, saved_as, tmp_path):
    model = converted(family, norm, MAPS["first kept"])
    exact = {n: p.clone() for n, p in model.named_parameters() if n.endswith((".A_log", ".dt_bias", ".D"))}
    assert len(exact) == 2 * 2 * 3  # layers, directions, parameters
    model.to(saved_as).save_pretrained(tmp_path)
    model.to(torch.bfloat16)
    expected = logits(model)
    for load in WAYS_IN.values():
        loaded = load(tmp_path, dtype=torch.bfloat16)
        for name, p in loaded.named_parameters():
            assert p.dtype == (torch.float32 if name in exact else torch.bfloat16), name
        assert all(torch.equal(loaded.get_parameter(name), p) for name, p in exact.items())
        assert expected.dtype == logits(loaded).dtype == torch.bfloat16
        assert torch.equal(logits(loaded), expected)


@every_family
def test_bfloat16_is_near_float32(family):
    model = converted(family, "layer")
    expected = logits(model)[0]
    assert relative_error(logits(model.to(torch.bfloat16))[0], expected) <= TOLERANCE["bfloat16 layer"]


@every_family
def test_without_the_head(family, tmp_path):
    model = converted(family, "layer", MAPS["first kept"])
    model.save_pretrained(tmp_path)
    audio, mask = audio_batch(SAMPLES)
    with torch.no_grad():
        expected = model.base_model(audio, attention_mask=mask).last_hidden_state
        for base in (AutoModel.from_pretrained(tmp_path).eval(), cald_speech.from_pretrained(tmp_path, head="base")):
            assert type(base).__name__ == f"Cald{family.classes['base'].__name__}"
            assert torch.equal(base(audio, attention_mask=mask).last_hidden_state, expected)


@every_family
def test_saved_again_it_is_the_same_folder(family, tmp_path):
    converted(family).save_pretrained(tmp_path / "first")
    cald_speech.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["model_type"] == f"cald_{family.model_type}"
    assert config["layer_map"]["default"]["mixer"] == "Bidirectional"


@both_norms
@every_family
def test_an_unconverted_folder_comes_back_with_padding_invisible(family, norm, tmp_path):
    tiny_model(family, norm).save_pretrained(tmp_path)
    model = cald_speech.from_pretrained(tmp_path)
    assert type(model) is family.classes["ctc"]
    alone = logits(model, (5000,))[0]
    audio, mask = audio_batch((5000, 8000))
    with torch.no_grad():
        own = model(audio[:1, :5000]).logits[0]
        padded = model(audio, attention_mask=mask).logits[0, : len(own)]
    assert alone.shape == own.shape
    assert relative_error(padded, own) <= TOLERANCE["rounding"]


@both_norms
@every_family
def test_a_copy_keeps_padding_invisible_and_lengths_of_its_own(family, norm):
    model = converted(family, norm)
    logits(model)  # lengths of a batch are in it
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert torch.equal(logits(twin), logits(model))
    # Each has run on another batch; a gradient-checkpointed layer would read these lengths now.
    logits(model, (8000, 5000))
    logits(twin, (7000, 3000, 400))
    ours, theirs = family.context(model), family.context(twin)
    assert ours is not theirs
    assert ours.samples.tolist() == [8000, 5000] and theirs.samples.tolist() == [7000, 3000, 400]
    for copied, context in ((model, ours), (twin, theirs)):
        assert len(copied.base_model._forward_pre_hooks) == 1
        assert all(family.slot_ends(layer)[0].context is context for layer in family.layers(copied))
        first = copied.base_model.feature_extractor.conv_layers[0].layer_norm
        assert getattr(first, "context", context) is context
        hooks = [hook for module in copied.modules() for hook in module._forward_hooks.values()]
        assert all(hook.__self__ is context for hook in hooks)


@every_family
def test_classes_and_configs_pickle(family):
    """Whole models do not: PyTorch refuses to pickle the weight norm in Hugging Face's positional convolution."""
    model = converted(family)
    assert pickle.loads(pickle.dumps(type(model))) is type(model)
    config = pickle.loads(pickle.dumps(model.config))
    assert type(config) is type(model.config) and config.to_dict() == model.config.to_dict()


# --- pipelines -------------------------------------------------------------------------------------------------------

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]


@pytest.fixture
def folder(request, tmp_path):
    """A converted model with a processor, as a recipe saves it."""
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    processor = Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True),
        Wav2Vec2CTCTokenizer(tmp_path / "vocab.json"),
    )
    model = converted(request.param, layer_map=MAPS["first kept"])
    torch.nn.init.normal_(model.lm_head.weight, std=5.0)  # many different letters
    torch.nn.init.constant_(model.lm_head.bias[1:4], -1e4)  # and no special symbols but the blank
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


every_folder = pytest.mark.parametrize("folder", SPEECH_CASES, indirect=True)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)


def normalised(audio: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((audio - audio.mean()) / np.sqrt(audio.var() + 1e-7))[None]


@torch.no_grad()
def frames_by_hand(folder, audio: np.ndarray) -> list[int]:
    """The best symbol of each frame."""
    return cald_speech.from_pretrained(folder)(normalised(audio)).logits[0].argmax(-1).tolist()


def text_by_hand(symbols: list[int]) -> str:
    """Repeats merged, then blanks dropped."""
    merged = [s for s, before in zip(symbols, [None, *symbols[:-1]], strict=True) if s != before]
    return squeezed("".join(LETTERS[s] for s in merged if s).replace("|", " "))


def squeezed(text: str) -> str:
    return " ".join(text.split())


@every_folder
def test_pipeline_is_greedy_decoding(folder):
    audio = noise(40_000)
    expected = text_by_hand(frames_by_hand(folder, audio))
    assert len(set(expected)) > 3
    recognise = pipeline("automatic-speech-recognition", model=str(folder))
    assert squeezed(recognise(audio)["text"]) == expected


@every_folder
def test_pipeline_in_chunks_is_greedy_decoding_of_the_chunks(folder):
    audio, frame = noise(40_000), 320
    chunk, stride = 48 * frame, 8 * frame
    symbols, start = [], 0
    while True:
        last = start + chunk >= len(audio)
        best = frames_by_hand(folder, audio[start : start + chunk])
        total = round(len(audio[start : start + chunk]) / frame)
        symbols += best[8 if start else 0 : total - (0 if last else 8)]
        if last:
            break
        start += chunk - 2 * stride
    recognise = pipeline("automatic-speech-recognition", model=str(folder))
    text = recognise(audio, chunk_length_s=chunk / 16_000, stride_length_s=stride / 16_000)["text"]
    assert squeezed(text) == text_by_hand(symbols)


@every_folder
def test_pipeline_in_batches_is_one_by_one(folder):
    recognise = pipeline("automatic-speech-recognition", model=str(folder))
    clips = [noise(size, seed) for seed, size in enumerate((16_000, 9000, 24_000))]
    alone = [recognise(clip.copy())["text"] for clip in clips]
    batched = [result["text"] for result in recognise([clip.copy() for clip in clips], batch_size=3)]
    assert len(set(alone)) == 3
    assert batched == alone


def test_what_stands_in_the_padding_is_blank():
    """For whoever decodes all frames, as transformers does; a tuple for whoever asks for one; other heads as before."""
    family = FAMILIES["wav2vec2"]
    model = converted(family)
    audio, mask = audio_batch(SAMPLES)
    with torch.no_grad():
        out = model(audio, attention_mask=mask)
        listed = model(audio, attention_mask=mask, labels=torch.ones(len(SAMPLES), 1).long(), return_dict=False)
    frames = family.context(model).frames
    for row, num_frames in zip(out.logits, frames, strict=True):
        assert (row[num_frames:].argmax(-1) == model.config.pad_token_id).all()
        assert row[:num_frames].isfinite().all()
    assert torch.equal(listed[1], out.logits)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def cut_weights(share: float):
    def edit(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return edit


UNKNOWN = {"default": {"mixer": "Mamba9", "arguments": {}}, "overrides": {}}
FAULTS = {
    "empty weights": (cut_weights(0.0), "truncated or damaged"),
    "weights cut in the header": (cut_weights(0.001), "truncated or damaged"),
    "weights cut at the end": (cut_weights(0.99), "truncated or damaged"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "in model.safetensors, got none",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot load a model from .*config.json"),
    "config cut": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    "another architecture": (
        lambda folder: ElectraConfig().save_pretrained(folder),
        "'electra' is not known: expected one of",
    ),
    "unknown architecture": (edit_config(model_type="none such"), "none such"),
    "another depth": (edit_config(num_hidden_layers=4), r"missing \(wav2vec2.encoder.layers.3"),
    "another width": (edit_config(intermediate_size=48), r"of another size \(.*\(64, 32\) for \(48, 32\)"),
    "layer of the map does not exist": (edit_config(num_hidden_layers=1), r"layer indices from 0 to 0"),
    "another layer map": (edit_config(layer_map={"default": None, "overrides": {}}), r"missing \(.*k_proj"),
    "no layer map": (edit_config(layer_map=None), "needs a layer_map"),
    "a broken layer map": (
        edit_config(layer_map={"default": None}),
        "layer_map .* cannot be read: .*overrides",
    ),
    "an unknown mixer": (edit_config(layer_map=UNKNOWN), "mixer 'Mamba9' is not known"),
    "said to be unconverted": (edit_config(model_type="wav2vec2"), r"missing \(.*k_proj"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_folder_is_refused_with_the_reason(fault, message, tmp_path):
    layer_map = LayerMap(SHARED, {1: None, 2: SHARED})
    converted(FAMILIES["wav2vec2"], layer_map=layer_map).save_pretrained(tmp_path)
    fault(tmp_path)
    with pytest.raises(UserError, match=f"(?si){message}"):
        cald_speech.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["facebook/wav2vec2-base", "/no/such/folder"], ids=["hub id offline", "no folder"])
def test_a_source_that_cannot_be_had(source):
    with pytest.raises(UserError, match=f"there is no folder '{source}', and .*hub"):
        cald_speech.from_pretrained(source)


def test_config_loads_alone(tmp_path):
    model = converted(FAMILIES["hubert"])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "CaldHubertConfig" and config.layer_map == model.config.layer_map
