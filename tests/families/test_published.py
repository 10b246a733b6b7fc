"""Models of the published checkpoints' configurations, on the meta device: their published sizes, and converted."""

from functools import partial

import pytest
import torch
from transformers import BertConfig, GPTNeoXConfig, LlamaConfig, RobertaConfig

from cald_speech import LayerMap, convert
from cald_speech.families import family_of
from cald_speech.mixers import Linformer, Mamba, Mamba2

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
ROBERTA = {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
PYTHIA = {"vocab_size": 50_304, "max_position_embeddings": 2048, "tie_word_embeddings": False}
PYTHIA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 8192}
LLAMA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_1B |= {"intermediate_size": 8192, "vocab_size": 128_256, "head_dim": 64, "tie_word_embeddings": True}
LINFORMER = partial(Linformer, max_length=512)
PAPER_MAMBA = partial(Mamba, expand=2.5)

# (config, head, parameters as published, mixer)
MODELS = {
    "bert-base-uncased": (BertConfig(**BASE, vocab_size=30_522), "base", 109_482_240, LINFORMER),
    "roberta-base": (RobertaConfig(**BASE, **ROBERTA), "base", 124_645_632, LINFORMER),
    "roberta-base, masked LM": (RobertaConfig(**BASE, **ROBERTA), "masked_lm", 124_697_433, LINFORMER),
    "pythia-160m": (GPTNeoXConfig(**BASE, **PYTHIA), "lm", 162_322_944, PAPER_MAMBA),
    "pythia-1b": (GPTNeoXConfig(**PYTHIA_1B, **PYTHIA), "lm", 1_011_781_632, PAPER_MAMBA),
    "pythia-1b, Mamba-2": (GPTNeoXConfig(**PYTHIA_1B, **PYTHIA), "lm", 1_011_781_632, Mamba2),
    "Llama-3.2-1B": (LlamaConfig(**LLAMA_1B), "lm", 1_235_814_400, Mamba2),
}


@pytest.mark.parametrize(("config", "head", "parameters", "mixer"), MODELS.values(), ids=MODELS)
def test_a_published_model_converts(config, head, parameters, mixer):
    family = family_of(config)
    with torch.device("meta"):
        model = family.load(config, model_class=family.class_with(head))
        expected = sum(p.numel() for p in mixer(config.hidden_size, config.num_attention_heads).parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters
    weights = family.attention_weights(model, family.layers(model)[0])
    attention = (
        weights.q,
        weights.k,
        weights.v,
        weights.o,
        weights.q_bias,
        weights.k_bias,
        weights.v_bias,
        weights.o_bias,
    )
    gone = sum(w.numel() for w in attention if w is not None)
    report = convert(model, family, LayerMap(mixer), initialise="random")
    assert report.num_parameters_before == parameters
    assert report.num_parameters_after == parameters + config.num_hidden_layers * (expected - gone)
    assert all(p.is_meta for p in model.parameters())
    assert set(report.layers) == {(mixer.func if isinstance(mixer, partial) else mixer).__name__}
