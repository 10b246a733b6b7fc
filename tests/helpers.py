"""What tests share: the one tolerance table, tiny models, padded batches and ways to compare."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cald_speech.families import Family, SpeechFamily, TextFamily, families
from cald_speech.ops.backends import Request, why_not_native

# Those that hear samples; tests/families/test_features.py has those that hear features.
SPEECH = {
    name: family
    for name, family in families().items()
    if isinstance(family, SpeechFamily) and family.input_key == "input_values"
}
TEXT = {name: family for name, family in families().items() if isinstance(family, TextFamily)}
# In `make test` these stand for every layout of a speech encoder; all others go through the same matrices in
# `make test-all`, and through tests/families/test_in_short.py everywhere.
USUAL = ("wav2vec2", "hubert", "wavlm")


def wide_unless_usual(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a case of the speech family ``name``."""
    return () if name in USUAL else (pytest.mark.wide,)


SPEECH_CASES = [pytest.param(family, id=name, marks=wide_unless_usual(name)) for name, family in SPEECH.items()]

# Largest difference allowed, as a fraction of the largest expected value.
TOLERANCE = {
    "parity": 1e-4,  # two algorithms for one result in float32: naive and chunked, outputs and gradients
    "rounding": 1e-5,  # the same algorithm with sums in another order: alone and padded, pieces and whole
    "gradient": 1e-4,  # the same, after a whole model's backward pass
    "float16": 2e-3,  # float16 against float32
    "bfloat16": 1e-2,  # bfloat16 against float32, one op
    "bfloat16 layer": 5e-2,  # the same after a whole mixer or model
}

NO_NATIVE = why_not_native(Request(torch.device("cpu"), torch.float32))
needs_native = pytest.mark.skipif(NO_NATIVE is not None, reason=f"no compiled kernels: {NO_NATIVE}")
NATIVE = pytest.param("native", marks=needs_native)  # the backend, for parametrize


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; NaN where either holds NaN."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-12)).item()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter by name; parameters without one are left out."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def worst_gradient(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of any parameter's gradient, and the parameter.

    An error is counted relative to the largest entry of the parameter's own gradient, or to a thousandth of the
    largest of all where that is more. Some gradients are zero in exact arithmetic (softmax does not see a key bias),
    and what is computed is the rounding of terms that cancel: where the gradient is under a thousandth of that of
    another parameter of its module (the weight beside the bias), the error is counted relative to the other.
    """
    assert actual.keys() == expected.keys()
    assert all(torch.isfinite(g).all() for g in actual.values())
    own = {name: g.abs().max().item() for name, g in expected.items()}
    around: dict[str, float] = {}
    for name, size in own.items():
        module = name.rpartition(".")[0]
        around[module] = max(size, around.get(module, 0.0))
    floor = 1e-3 * max(own.values())

    def scale(name: str) -> float:
        beside = around[name.rpartition(".")[0]]
        return max(beside if own[name] < 1e-3 * beside else own[name], floor)

    errors = {name: (actual[name] - g).abs().max().item() / scale(name) for name, g in expected.items()}
    return max((error, name) for name, error in errors.items())


# What makes a family's models small, beside what does so in all.
SMALL = {
    "sew": {"conv_kernel": (10, 3, 3, 3, 3, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2)},
    "data2vec-audio": {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5},
    "wav2vec2-conformer": {"conv_depthwise_kernel_size": 5, "max_source_positions": 20, "conformer_conv_dropout": 0.0},
}


def tiny_config(family: Family, norm: str = "layer", layers: int = 3, **options) -> PretrainedConfig:
    """A config of some 40,000 parameters without dropout; ``norm``: ``group`` (base) or ``layer`` (large models)."""
    dropouts = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout")
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 32,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": norm == "layer",
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
        **dict.fromkeys(dropouts, 0.0),
        **SMALL.get(family.model_type, {}),
    }
    return family.config_class(**(defaults | options))


def parakeet_config(*, vocab_size: int = 32, pad_token_id: int = 31, **encoder) -> PretrainedConfig:
    """The same for Parakeet, whose sizes have names of their own."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_kernel_size": 5,
        "subsampling_conv_channels": 8,
        "num_mel_bins": 16,
        **dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0),
    }
    config_class = families()["parakeet_ctc"].config_class
    return config_class(vocab_size=vocab_size, pad_token_id=pad_token_id, encoder_config=sizes | encoder)


def tiny_model(family: Family, norm: str = "layer", layers: int = 3, seed: int = 0, **options) -> PreTrainedModel:
    """A prepared CTC model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return family.load(tiny_config(family, norm, layers, **options)).eval()


def one_frame(model: PreTrainedModel) -> int:
    """Samples that give one frame in the layers of a tiny model."""
    return 400 + 320 * (getattr(model.config, "squeeze_factor", 1) - 1)


def prefix(family: Family) -> str:
    """How the names of the base model's parameters begin in a model with a head, e.g. ``unispeech_sat``."""
    return family.classes["base"].base_model_prefix


def names_in_attention(family: Family) -> tuple[str, str, str, str, str]:
    """The slot's name in a layer, and those of the projections q, k, v and o in an attention there."""
    if family.model_type == "wav2vec2-conformer":
        return "self_attn", "linear_q", "linear_k", "linear_v", "linear_out"
    return "attention", "q_proj", "k_proj", "v_proj", "out_proj"


def audio_batch(samples: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise of so many samples each, padded with zeros: (B, max) audio and its (B, max) attention mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(samples)) < torch.tensor(samples)[:, None]).long()
    return torch.randn(mask.shape, generator=generator) * mask, mask


def padded_batch(lengths: Sequence[int], width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random (B, max, width) activations, noise at the padding too, and their (B,) lengths."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(lengths), max(lengths), width, generator=generator), torch.tensor(lengths)


def flip_valid(v: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence of ``v`` (B, T, ...) reversed within its valid frames; padding becomes zero."""
    flipped = torch.zeros_like(v)
    for row, length in enumerate(lengths.tolist()):
        flipped[row, :length] = v[row, :length].flip(0)
    return flipped
