"""Tiny random text models of every family and layout, and padded batches of tokens for them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from cald_speech import LayerMap, convert
from cald_speech.families import Family
from cald_speech.mixers import Bidirectional, GatedLinearAttention, Linformer, Mamba, Mamba2
from tests.helpers import TEXT

LAYERS, WIDTH, HEADS, VOCABULARY = 3, 32, 4, 50
LENGTHS = (11, 7, 1, 4)
SHARED = partial(Bidirectional, share_projections=True)
SHARED_LINFORMER = partial(Linformer, k=5, max_length=16, sharing="layer")
# Beside each family's config as it is.
LAYOUTS = {
    "gpt_neox": {"sequential": {"use_parallel_residual": False}, "without biases": {"attention_bias": False}},
    "llama": {"with biases": {"attention_bias": True, "num_key_value_heads": 4}},
    "mistral": {"without a window": {"sliding_window": None}},
    "modernbert": {"with biases": {"attention_bias": True}},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1},
    "xlm-roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1},
    "distilbert": {"hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": None, "sep_token_id": None},
    "gpt2": {"n_inner": 64, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "tie_word_embeddings": False},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}


class Case(NamedTuple):
    """A family in one of its layouts."""

    family: Family
    options: dict[str, Any]

    def config(self, **options) -> PretrainedConfig:
        common = {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 64,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            "initializer_range": 0.2,
        }
        defaults = DEFAULTS.get(self.family.model_type, {})
        return self.family.config_class(**{**common, **defaults, **self.options, **options})

    def model(self, head: str | None = None, seed: int = 0, **options) -> PreTrainedModel:
        """Prepared, in evaluation mode, with biases that are not zero."""
        torch.manual_seed(seed)
        family = self.family
        model = family.load(self.config(**options), model_class=family.class_with(head or family.default_head))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    def converted(self, chosen: str, head: str | None = None, **options) -> PreTrainedModel:
        """By the layer map of that name; the paper's mixers have no start from attention that fits."""
        model = self.model(head, **options)
        convert(model, self.maps()[chosen], initialise="random" if chosen == "paper" else "attention")
        return model.eval()

    def maps(self) -> dict[str, LayerMap]:
        first, second = (Mamba2, GatedLinearAttention) if self.family.causal else (SHARED, Bidirectional)
        return {
            "kept": LayerMap(),
            "all converted": LayerMap(first),
            "first converted": LayerMap(None, {0: second}),
            "middle kept": LayerMap(first, {1: None}),
            "paper": LayerMap(partial(Mamba, expand=2.5) if self.family.causal else SHARED_LINFORMER),
        }


# In `make test` these stand for every layout of a text model; all others go through the same matrices in
# `make test-all`, and through tests/families/test_text_in_short.py everywhere.
USUAL = ("bert", "roberta", "gpt_neox", "llama")


def each(cases: dict[str, Any]) -> list[Any]:
    """What parametrize takes, from cases (or tuples with one) by names that begin with their family's."""
    return [
        pytest.param(
            *((of,) if isinstance(of, Case) else of),
            id=name,
            marks=() if name.replace("-", " ").split()[0] in USUAL else pytest.mark.wide,
        )
        for name, of in cases.items()
    ]


MAPS = ("kept", "all converted", "first converted", "middle kept", "paper")
CASES = {name: Case(family, {}) for name, family in TEXT.items()} | {
    f"{name} {layout}": Case(TEXT[name], options)
    for name, layouts in LAYOUTS.items()
    for layout, options in layouts.items()
}
CAUSAL = {name: case for name, case in CASES.items() if case.family.causal}
ENCODERS = {name: case for name, case in CASES.items() if not case.family.causal}


def every_map_once(cases: dict[str, Case], maps: Sequence[str]) -> dict[str, tuple[Case, str]]:
    """By name, each family as it is with every map, and its other layouts with everything converted.

    For what is built on logits that test_text_contract.py has compared in every layout with every map.
    """
    chosen = [(name, map_) for name, case in cases.items() for map_ in maps]
    return {
        f"{name}-{map_}": (cases[name], map_)
        for name, map_ in chosen
        if not cases[name].options or map_ == "all converted"
    }


def tokens_and_mask(
    lengths: Sequence[int] = LENGTHS, *, left: bool = False, pad: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(B, max) random tokens, ``pad`` at the padding, and the (B, max) attention mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(5, VOCABULARY, mask.shape, generator=generator).where(mask.bool(), pad)
    if left:
        tokens, mask = (torch.stack([row.roll(-n) for row, n in zip(t, lengths, strict=True)]) for t in (tokens, mask))
    return tokens, mask


def positions_of(model: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
    """For rows that are padded in front, where positions are learned: what ``generate`` gives them."""
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if "gpt2" in model.config.model_type else {}


def valid_logits(model: PreTrainedModel, *, left: bool = False, lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    """The logits of each row of one padded batch, without the padding."""
    tokens, mask = tokens_and_mask(lengths, left=left, pad=model.config.pad_token_id)
    logits = model(tokens, attention_mask=mask, **(positions_of(model, mask) if left else {})).logits
    return [row[valid] for row, valid in zip(logits, mask.bool(), strict=True)]


def logits_alone(model: PreTrainedModel, lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    tokens, _ = tokens_and_mask(lengths)
    return [model(tokens[row : row + 1, :length]).logits[0] for row, length in enumerate(lengths)]
