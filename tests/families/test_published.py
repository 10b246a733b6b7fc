"""Models of the published checkpoints' configurations, on the meta device: their published sizes, and converted."""

import math
from functools import partial

import pytest
import torch
from transformers import (
    BertConfig,
    Data2VecAudioConfig,
    DistilBertConfig,
    GPT2Config,
    GPTNeoXConfig,
    HubertConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    ParakeetCTCConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SEWConfig,
    UniSpeechConfig,
    UniSpeechSatConfig,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    WavLMConfig,
    WhisperConfig,
    XLMRobertaConfig,
)

from cald_speech import LayerMap, convert
from cald_speech.families import family_of
from cald_speech.mixers import Bidirectional, Linformer, Mamba, Mamba2

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
ROBERTA = {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
PARAKEET = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8, "intermediate_size": 4096}
SEW_TINY = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_conv_pos_embeddings": 31}
PYTHIA = {"vocab_size": 50_304, "max_position_embeddings": 2048, "tie_word_embeddings": False}
PYTHIA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 8192}
LLAMA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_1B |= {"intermediate_size": 8192, "vocab_size": 128_256, "head_dim": 64, "tie_word_embeddings": True}
XLM_R = ROBERTA | {"vocab_size": 250_002}
QWEN2 = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN2 |= {"intermediate_size": 4864, "vocab_size": 151_936, "tie_word_embeddings": True}
QWEN3 = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
QWEN3 |= {"intermediate_size": 3072, "vocab_size": 151_936, "tie_word_embeddings": True, "head_dim": 128}
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
    "distilbert-base-uncased": (DistilBertConfig(), "base", 66_362_880, LINFORMER),
    "xlm-roberta-base": (XLMRobertaConfig(**BASE, **XLM_R), "base", 278_043_648, LINFORMER),
    "ModernBERT-base": (ModernBertConfig(), "base", 149_014_272, LINFORMER),
    "gpt2": (GPT2Config(), "lm", 124_439_808, Mamba2),
    "Mistral-7B-v0.1": (MistralConfig(), "lm", 7_241_732_096, Mamba2),
    "Qwen2.5-0.5B": (Qwen2Config(**QWEN2), "lm", 494_032_768, Mamba2),
    "Qwen3-0.6B": (Qwen3Config(**QWEN3), "lm", 596_049_920, Mamba2),
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
    layer = family.layers(model)[0]
    gone += sum(p.numel() for n, p in layer.named_parameters() if n.endswith(("q_norm.weight", "k_norm.weight")))
    report = convert(model, LayerMap(mixer), initialise="random")
    assert report.num_parameters_before == parameters
    assert report.num_parameters_after == parameters + config.num_hidden_layers * (expected - gone)
    assert all(p.is_meta for p in model.parameters())
    assert set(report.layers) == {(mixer.func if isinstance(mixer, partial) else mixer).__name__}


# --- speech ----------------------------------------------------------------------------------------------------------

SPEECH_BASE = {**BASE, "feat_extract_norm": "group", "conv_bias": False, "do_stable_layer_norm": False}
SPEECH_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SPEECH_LARGE |= {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
DATA2VEC = {"conv_bias": False, "num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19}
DATA2VEC_BASE = BASE | {"feat_extract_norm": "layer"} | DATA2VEC
DATA2VEC_LARGE = SPEECH_LARGE | DATA2VEC
WHISPER_MEDIUM = {"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096}
SHARED = partial(Bidirectional, share_projections=True)

# (config, head, parameters). They count what the class of that head loads: the encoder with SpecAugment's vector
# (masked_spec_embed) and, for ctc, its head of 32 characters; not the quantiser, projections and label embeddings that
# pretraining alone needed, which the papers' rounder figures (95 M, 317 M) hold. No page gives most of them to the last
# digit, so speech_parameters() works each out.
SPEECH_MODELS = {
    "wav2vec2-base": (Wav2Vec2Config(**SPEECH_BASE), "base", 94_371_712),
    "wav2vec2-large-lv60": (Wav2Vec2Config(**SPEECH_LARGE), "base", 315_438_720),
    "wav2vec2-large-960h-lv60-self": (Wav2Vec2Config(**SPEECH_LARGE, vocab_size=32), "ctc", 315_471_520),
    "data2vec-audio-base": (Data2VecAudioConfig(**DATA2VEC_BASE), "base", 93_164_288),
    "data2vec-audio-large": (Data2VecAudioConfig(**DATA2VEC_LARGE), "base", 313_276_416),
    "hubert-base-ls960": (HubertConfig(**SPEECH_BASE), "base", 94_371_712),
    "hubert-large-ll60k": (HubertConfig(**SPEECH_LARGE), "base", 315_438_720),
    "unispeech-1350-en-353-fr-ft-1h": (UniSpeechConfig(**SPEECH_LARGE), "base", 315_438_720),
    "unispeech-sat-base": (UniSpeechSatConfig(**SPEECH_BASE), "base", 94_371_712),
    "unispeech-sat-large": (UniSpeechSatConfig(**SPEECH_LARGE | {"conv_bias": False}), "base", 315_435_136),
    # Layers, width and heads are FastConformer's XL and XXL, as their cards say; the totals are arithmetic (600 million
    # and 1.1 thousand million on the cards; 4.25 GB for the file of the larger one).
    "parakeet-ctc-0.6b": (ParakeetCTCConfig(encoder_config=PARAKEET), "ctc", 608_799_745),
    "parakeet-ctc-1.1b": (ParakeetCTCConfig(encoder_config=PARAKEET | {"num_hidden_layers": 42}), "ctc", 1_062_540_289),
    # The totals are arithmetic, and what the paper's 40.7 and 89.6 million are before rounding.
    "sew-tiny-100k": (SEWConfig(**SEW_TINY), "base", 40_708_895),
    "sew-small-100k": (SEWConfig(num_conv_pos_embeddings=31), "base", 89_620_511),
    "w2v-bert-2.0": (Wav2Vec2BertConfig(), "base", 580_493_120),
    "wav2vec2-conformer-rel-pos-large": (Wav2Vec2ConformerConfig(**SPEECH_LARGE), "base", 618_559_104),
    "wav2vec2-conformer-rope-large": (
        Wav2Vec2ConformerConfig(**SPEECH_LARGE, position_embeddings_type="rotary"),
        "base",
        593_344_128,
    ),
    "wavlm-base-plus": (WavLMConfig(**SPEECH_BASE), "base", 94_381_936),
    "wavlm-large": (WavLMConfig(**SPEECH_LARGE | {"conv_bias": False}), "base", 315_453_120),
    "whisper-medium, 102 languages": (WhisperConfig(**WHISPER_MEDIUM, num_labels=102), "classification", 307_504_998),
}


def speech_parameters(config, head: str) -> int:
    """The same figures by arithmetic from the papers' layouts: no model has a say in them."""
    if config.model_type == "wav2vec2-bert":
        return wav2vec2_bert_parameters(config)
    if config.model_type == "whisper":
        return whisper_parameters(config)
    if config.model_type == "parakeet_ctc":
        return parakeet_parameters(config.encoder_config) + (config.encoder_config.hidden_size + 1) * config.vocab_size
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    channels = [1, *config.conv_dim]
    convolutions = sum(a * b * k for a, b, k in zip(channels, channels[1:], config.conv_kernel, strict=False))
    biases = sum(config.conv_dim) if config.conv_bias else 0
    norms = 2 * (sum(config.conv_dim) if config.feat_extract_norm == "layer" else config.conv_dim[0])
    projection = 2 * channels[-1] + (channels[-1] + 1) * width
    reach, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
    positions = width * width // groups * reach + reach + width  # direction, one length for each place, bias
    if config.model_type == "data2vec-audio":  # several, each of kernel and bias
        positions = reach * (width * width // groups * config.conv_pos_kernel_size + width)
    layer = 4 * (width + 1) * width + 2 * 2 * width + (width + 1) * inner + (inner + 1) * width
    total = convolutions + biases + norms + projection + width + positions + 2 * width
    total += config.num_hidden_layers * layer
    if config.model_type == "wav2vec2-conformer":  # feed-forward and norms twice, and a convolution with two norms
        second = 2 * 2 * width + (width + 1) * inner + (inner + 1) * width
        convolution = 4 * width + 3 * width * width + config.conv_depthwise_kernel_size * width
        relative = width * width + 2 * width if config.position_embeddings_type == "relative" else 0
        total += config.num_hidden_layers * (second + convolution + relative)
    if config.model_type == "sew":  # no projection where the widths are equal, and one back from each layer's frame
        total += (width + 1) * width * config.squeeze_factor
        total -= (channels[-1] + 1) * width if channels[-1] == width else 0
    if config.model_type == "wavlm":  # a gate of eight numbers from each head's width, its scale, and one table
        total += config.num_hidden_layers * ((width // heads + 1) * 8 + heads) + config.num_buckets * heads
    return total + ((width + 1) * config.vocab_size if head == "ctc" else 0)


def parakeet_parameters(config) -> int:
    width, inner, channels = config.hidden_size, config.intermediate_size, config.subsampling_conv_channels
    subsampling = 10 * channels + 2 * (10 * channels + (channels + 1) * channels)
    subsampling += (config.num_mel_bins // 8 * channels + 1) * width
    feed_forwards = 2 * ((width + 1) * inner + (inner + 1) * width)
    attention = 4 * (width + 1) * width + width * width + 2 * width  # positions, and two biases of a head's size
    convolution = 2 * (width + 1) * width + (config.conv_kernel_size + 1) * width + 2 * width + (width + 1) * width
    return subsampling + config.num_hidden_layers * (feed_forwards + attention + convolution + 5 * 2 * width)


def wav2vec2_bert_parameters(config) -> int:
    width, inner, features = config.hidden_size, config.intermediate_size, config.feature_projection_input_dim
    distances = config.left_max_position_embeddings + config.right_max_position_embeddings + 1
    feed_forwards = 2 * ((width + 1) * inner + (inner + 1) * width)
    attention = 4 * (width + 1) * width + distances * width // config.num_attention_heads
    convolution = 3 * width * width + config.conv_depthwise_kernel_size * width
    layer = feed_forwards + attention + convolution + 6 * 2 * width  # six norms
    return 2 * features + (features + 1) * width + width + config.num_hidden_layers * layer


def whisper_parameters(config) -> int:
    """The encoder and its head; the decoder goes."""
    width, inner, labels = config.d_model, config.encoder_ffn_dim, config.classifier_proj_size
    convolutions = (3 * config.num_mel_bins + 1) * width + (3 * width + 1) * width
    attention = 4 * width * width + 3 * width  # keys have no bias
    layer = attention + 2 * 2 * width + (width + 1) * inner + (inner + 1) * width
    head = (width + 1) * labels + (labels + 1) * config.num_labels
    return convolutions + config.max_source_positions * width + config.encoder_layers * layer + 2 * width + head


@pytest.mark.parametrize(("config", "head", "parameters"), SPEECH_MODELS.values(), ids=SPEECH_MODELS)
def test_a_published_speech_model_converts(config, head, parameters):
    assert speech_parameters(config, head) == parameters
    family = family_of(config)
    with torch.device("meta"):
        model = family.load(config, model_class=family.class_with(head))
        sizes = family.encoder_config(config)
        expected = size(SHARED(sizes.hidden_size, sizes.num_attention_heads))
    assert size(model) == parameters
    # All of it goes, WavLM's gates and its table of biases too.
    attention = sum(size(family.attention(layer)) for layer in family.layers(model))
    report = convert(model, LayerMap(SHARED), initialise="random")
    assert report.num_parameters_before == parameters
    assert report.num_parameters_after == parameters - attention + sizes.num_hidden_layers * expected == size(model)
    # as hparams/mamba.yaml says; attention is a smaller part of a conformer, and a greater of Whisper's encoder
    others = ("parakeet_ctc", "wav2vec2-bert", "wav2vec2-conformer", "whisper")
    assert config.model_type in others or math.isclose(report.num_parameters_after / parameters, 1.08, abs_tol=0.005)
    # transformers makes SpecAugment's vector on the CPU, wherever the rest is.
    assert all(p.is_meta for name, p in model.named_parameters() if "masked_spec_embed" not in name)
    assert set(report.layers) == {"Bidirectional"}


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
