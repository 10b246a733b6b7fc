"""The front door: what ``import cald_speech`` offers, what it leaves alone, and how transformers hears of it."""

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cald_speech
from cald_speech import LayerMap, Mamba2, convert


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there():
    for name, module in cald_speech.PUBLIC.items():
        assert getattr(cald_speech, name) is getattr(importlib.import_module(module), name)
    assert set(cald_speech.PUBLIC) == set(cald_speech.__all__) <= set(dir(cald_speech))
    with pytest.raises(AttributeError, match="no attribute 'Mamba3'"):
        _ = cald_speech.Mamba3


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(cald_speech.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: line.module for line in block.body for alias in line.names}
    assert seen == cald_speech.PUBLIC


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, pad_token_id=0, eos_token_id=None))
    convert(model, LayerMap(Mamba2, {1: None}))
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    model.save_pretrained(folder := tmp_path_factory.mktemp("converted"))
    return folder


# The package first: transformers imports AutoConfig while it imports a model class, and long before its first use.
THE_PACKAGE_FIRST = """
import sys, cald_speech
assert set(cald_speech.PUBLIC) <= set(dir(cald_speech))
assert not {"torch", "transformers", "numpy"} & {*sys.modules}, "the package itself is light"
from transformers import LlamaModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder)
"""
# In a folder that said `llama`, transformers alone would load random attention and only mention it; it may not run the
# file of this one either.
TRANSFORMERS_FIRST = """
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("transformers alone has to fail loudly")
import cald_speech
model = AutoModelForCausalLM.from_pretrained(folder)
"""
A_PIPELINE_RELOADED = """
import importlib, cald_speech
importlib.reload(cald_speech)
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast, pipeline
importlib.reload(cald_speech)
AutoConfig.for_model("cald_llama")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 1}, unk_token="a")))
model = pipeline("text-generation", model=folder, tokenizer=tokenizer).model
"""
IN_ANY_ORDER = {
    "the package first": THE_PACKAGE_FIRST,
    "transformers first": TRANSFORMERS_FIRST,
    "a pipeline, reloaded": A_PIPELINE_RELOADED,
}


@pytest.mark.slow  # a Python process each, which imports transformers
@pytest.mark.parametrize("code", IN_ANY_ORDER.values(), ids=IN_ANY_ORDER)
def test_transformers_reads_a_converted_folder_in_any_order_of_imports(code, model, folder):
    ask = "import torch; print(type(model).__name__, model.eval()(torch.arange(9)[None]).logits.sum().item())"
    name, total = in_a_fresh_process(f"folder = {str(folder)!r}{code}{ask}").split()[-2:]
    assert name == "CaldLlamaForCausalLM"
    assert float(total) == pytest.approx(model(torch.arange(9)[None]).logits.sum().item(), rel=1e-4)


@pytest.mark.slow  # a Python process, which imports transformers
def test_a_pickle_is_read_where_nothing_was_imported(model, tmp_path):
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = f"import pickle; print(type(pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))).__name__)"
    assert in_a_fresh_process(code) == "CaldLlamaForCausalLM"
