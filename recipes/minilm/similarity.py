"""What a student keeps of its teacher's similarities: rank correlation over all pairs, and retrieval at 1.

A sentence's embedding is the mean of its tokens' last hidden states, of length 1 (Reimers & Gurevych, arXiv
1908.10084); a similarity is the product of two.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cald_speech.conversion import LayerMap, convert, from_pretrained
from cald_speech.families import family_of
from cald_speech.mixers import MixerFactory
from cald_speech.ops import mask_padding
from cald_speech.tasks.processors import tokenizer_of

AT_ONCE, MAX_TOKENS = 64, 128


def embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_tokens: int = MAX_TOKENS
) -> Tensor:
    """(N, D) float32, in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), AT_ONCE):
        places = order[start : start + AT_ONCE]
        inputs = tokenizer(
            [texts[i] for i in places], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state
        lengths = inputs["attention_mask"].sum(-1)
        found[places] = mask_padding(states, lengths).sum(1) / lengths[:, None]
    return F.normalize(found, dim=-1)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two lists of numbers without ties.

    Example
    -------
    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 15.0]))
    0.5
    """
    ranks = [v.argsort().argsort().double() for v in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def kept(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Of embeddings (N, D) of the same sentences: rank correlation of all pairs, and nearest neighbours that agree."""
    theirs, ours = teacher @ teacher.T, student @ student.T
    pairs = torch.triu_indices(len(teacher), len(teacher), offset=1).unbind()
    own = torch.eye(len(teacher), dtype=torch.bool)
    nearest = [v.masked_fill(own, -2.0).argmax(-1) for v in (theirs, ours)]
    same = (nearest[0] == nearest[1]).double().mean().item()
    return {"rank correlation": rank_correlation(ours[pairs], theirs[pairs]), "same nearest %": 100 * same}


def retrieved(first: Tensor, second: Tensor) -> float:
    """Percentage of sentences whose nearest of the ``second`` is their own.

    Example
    -------
    >>> retrieved(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]])
    50.0
    """
    return 100 * ((first @ second.T).argmax(-1) == torch.arange(len(first))).double().mean().item()


def figures(folder: str, teacher: str, sentences: Sequence[str], pairs: Sequence[Sequence[str]]) -> dict[str, float]:
    """All of a model's, beside the embeddings of its teacher."""
    tokenizer = tokenizer_of((), teacher)
    models = [from_pretrained(place, head="base").eval() for place in (folder, teacher)]
    ours, theirs = (embeddings(model, tokenizer, sentences) for model in models)
    ends = [embeddings(models[0], tokenizer, texts) for texts in zip(*pairs, strict=True)]
    return kept(ours, theirs) | {"retrieval at 1 %": retrieved(*ends)}


def seconds_by_length(teacher: str | Path, mixer: MixerFactory | None, lengths: Sequence[int]) -> dict[int, float]:
    """Seconds of one forward pass, the faster of two, at the teacher's shape, with random weights and enough positions.

    mixer : of all layers; None keeps the attention.
    """
    loaded = from_pretrained(str(teacher), head="base")
    family = family_of(loaded)
    config = type(loaded.config).from_dict(loaded.config.to_dict() | {"max_position_embeddings": max(lengths)})
    torch.manual_seed(0)
    model = family.load(config, model_class=family.classes["base"])
    if mixer is not None:
        convert(model, LayerMap(mixer), initialise="random")
    model.eval()
    found = {}
    for length in lengths:
        tokens = torch.randint(1, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        seconds = []
        for _ in range(3):  # the first one warms up
            start = time.perf_counter()
            with torch.inference_mode():
                model(tokens)
            seconds.append(time.perf_counter() - start)
        found[length] = min(seconds[1:])
    return found
