"""A model folder is data: what is wrong in it is named by file and key, before memory is taken for it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import cald_speech
from cald_speech import LayerMap, convert
from cald_speech.data.audio import read_audio
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.families.hub import load_processor
from cald_speech.mixers import Bidirectional
from tests.conftest import once_for_all_workers
from tests.faults.folders import sound
from tests.helpers import tiny_model

MAMBA2 = {"mixer": "Mamba2", "arguments": {}}
DEEP = MAMBA2
for _ in range(8):
    DEEP = {"mixer": "Bidirectional", "arguments": {"mixer": DEEP}}


def of(default) -> dict:
    return {"layer_map": {"default": default, "overrides": {}}}


def bidirectional(**arguments) -> dict:
    return of({"mixer": "Bidirectional", "arguments": arguments})


CONFIGS = {
    "text for a size": ({"hidden_size": "x"}, "'hidden_size' expected int"),
    "a truth for a size": ({"hidden_size": True}, "'hidden_size' expected int"),
    "a negative size": ({"hidden_size": -3}, r"config\.json: hidden_size: expected a number from 1"),
    "a size of zero": ({"num_attention_heads": 0}, r"config\.json: num_attention_heads: expected a number from 1"),
    "a size past all integers": ({"vocab_size": 10**30}, r"config\.json: vocab_size: expected a number from 1"),
    "a size past all memory": ({"vocab_size": 2**31}, "describes a model of .* for vocab_size"),
    "a width past all memory": ({"intermediate_size": 2**30}, "describes a model of .* for intermediate_size"),
    "more layers than any model": ({"num_hidden_layers": 10**9}, r"num_hidden_layers: expected .* 1,024"),
    "labels without end": ({"num_labels": 10**9}, "num_labels: expected"),
    "a size that does not divide": ({"hidden_size": 7}, "hidden_size: 7: ValueError"),
    "an activation of no name": ({"hidden_act": "none such"}, "hidden_act: 'none such'"),
    "labels of another kind": ({"id2label": [1]}, "id2label: expected"),
    "an architecture of another kind": ({"model_type": ["wav2vec2"]}, "model_type: expected the name"),
    "NaN": ({"layer_norm_eps": float("nan")}, "layer_norm_eps: expected finite numbers"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights cannot be converted"),
    "another file of weights": ({"transformers_weights": "x.bin"}, "transformers_weights: the weights are those in"),
    "kernels from the hub": ({"_attn_implementation": "evil/kernels"}, "_attn_implementation: expected one of"),
    "a mixer that is none": (of({"mixer": "Module", "arguments": {}}), "mixer 'Module' is not known"),
    "a base of mixers": (of({"mixer": "CausalMixer", "arguments": {}}), "layer_map: cannot build the mixer of layer 0"),
    "a negative chunk": (bidirectional(chunk_size=-1000), "chunk_size: expected a whole number from 1"),
    "a state past all memory": (bidirectional(d_state=2**40), "d_state: expected a whole number from 1"),
    "a state larger than the weights": (bidirectional(d_state=2**16), "describes a model of|of another size"),
    "a truth for a size of a mixer": (bidirectional(d_state=True), "d_state: expected a whole number"),
    "text for a switch": (bidirectional(share_projections="yes"), "share_projections: expected True or False"),
    "a backend of no name": (bidirectional(backend="os"), "backend: expected one of auto"),
    "an option of no name": (bidirectional(speed=3), "speed"),
    "mixers in mixers": (of(DEEP), "expected mixers in mixers up to 4 deep"),
    "a map that is none": ({"layer_map": 3}, "layer_map: expected keys and values"),
    "a layer of no number": ({"layer_map": {"default": None, "overrides": {"x": None}}}, "overrides: expected layers"),
    "deeply nested": ({"layer_map": json.loads("[" * 60 + "]" * 60)}, "layer_map: expected values nested up to"),
}
WEIGHTS = {
    "integers": (lambda w: w.to(torch.int64), r"expected floating numbers, got .*k_proj\.weight \(I64\)"),
    "truths": (lambda w: w > 0, r"expected floating numbers, got .*k_proj\.weight \(BOOL\)"),
    "complex": (lambda w: w.to(torch.complex64), r"expected floating numbers, got .*k_proj\.weight \(C64\)"),
    "NaN": (lambda w: w * float("nan"), r"expected finite numbers, got NaN or infinity in .*k_proj\.weight"),
    "infinity": (lambda w: w / 0, r"expected finite numbers, got NaN or infinity in .*k_proj\.weight"),
}
PROCESSORS = {
    "preprocessor_config.json": {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 10**12},
    "tokenizer_config.json": {"tokenizer_class": "Wav2Vec2CTCTokenizer", "word_delimiter_token": 3},
    "vocab.json": {"<pad>": 0, "a": -1},
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    def make(folder) -> None:
        model = tiny_model(families()["wav2vec2"])
        convert(model, LayerMap(Bidirectional, {1: None}))
        model.save_pretrained(folder)

    return once_for_all_workers(tmp_path_factory, "a folder to damage", make)


@pytest.fixture
def folder(converted, tmp_path):
    for path in converted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(("values", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_refused_by_its_key(values, message, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError, match=message):
        cald_speech.from_pretrained(folder)


def test_a_file_of_nothing_but_brackets(folder):
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json: not a valid JSON"):
        cald_speech.from_pretrained(folder)


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_refused_by_their_names(change, message, folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("k_proj.weight"))
    save_file(weights | {name: change(weights[name])}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        cald_speech.from_pretrained(folder)


@pytest.mark.parametrize("saved", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16], ids=str)
def test_any_floating_dtype_is_cast_as_asked(saved, asked, folder):
    path = folder / "model.safetensors"
    save_file({name: w.to(saved) for name, w in load_file(path).items()}, path, metadata={"format": "pt"})
    model = cald_speech.from_pretrained(folder, dtype=asked)
    kept = (".A_log", ".dt_bias", ".D")
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith(kept) else asked), name


def test_older_files_of_weights_are_read_as_tensors_alone(folder, tmp_path):
    """HuBERT's and WavLM's folders on the hub have no others."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    state = cald_speech.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())

    class RunsCode:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save(weights | {"x": RunsCode()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: expected tensors and nothing else") as caught:
        cald_speech.from_pretrained(folder)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_git_leaves_in_the_place_of_weights_is_called_so(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=rf"{name}: expected weights, got Git LFS's pointer to them: .*git lfs pull"):
        cald_speech.from_pretrained(folder)
    (folder / "a.wav").write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=r"a\.wav: .*Git LFS's pointer to one\). Fetch it"):
        read_audio(folder / "a.wav")


def test_an_adapter_that_names_another_model_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(UserError, match=r"got a PEFT adapter beside one .*merge_and_unload"):
        cald_speech.from_pretrained(folder)


def test_shards_stay_in_the_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(UserError, match="weight_map: expected names of safetensors files here"):
        cald_speech.from_pretrained(folder)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_is_refused_by_file_and_key(name, tmp_path):
    for path in sound()["plain"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(json.dumps(PROCESSORS[name]))
    key = [*PROCESSORS[name]][-1]
    with pytest.raises(UserError, match=rf"{name}: '?{key}'?: expected"):
        load_processor(tmp_path)
