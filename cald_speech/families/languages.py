"""Languages of one model: MMS (Pratap et al., arXiv 2305.13516) keeps an adapter, a head and a vocabulary for each.

A checkpoint holds one language's weights, and files ``adapter.<language>.safetensors`` with the others'. A converted
model is of one language, which its tokenizer names.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cald_speech.errors import UserError

MOST_NAMED = 40


def speak(model: PreTrainedModel, source: str, language: str) -> None:
    """Give a model with a CTC head, just loaded from ``source``, the adapter and the head of a language, in place.

    Raises UserError for a model without adapters, and for a language that it does not have, naming those that it has.
    """
    if getattr(model.config, "adapter_attn_dim", None) is None or not hasattr(model, "lm_head"):
        raise UserError(
            f"target_lang: expected a model with a CTC head and an adapter for each language (MMS), and {source!r} has "
            f"none. Leave target_lang out, got {language!r}"
        )
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    known, folder = languages_of(tokenizer), Path(source)
    if folder.is_dir():
        files = {path.name.split(".")[1] for path in folder.glob("adapter.*.*")}
        known = [name for name in known if name in files] or [tokenizer.target_lang]
        if not files and language == tokenizer.target_lang:
            return
    _check(language, known)
    try:
        model.load_adapter(language, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"target_lang: the adapter of {language!r} in {source!r} cannot be loaded: {error}") from error
    model.target_lang = None  # transformers would read the file again, over what was trained


def write_in(tokenizer: PreTrainedTokenizerBase, language: str) -> None:
    """Let a tokenizer write a language, in place. Raises UserError for one that it does not know, naming the others."""
    known = languages_of(tokenizer)
    if not known:
        raise UserError(
            f"target_lang: expected a tokenizer with a vocabulary for each language (MMS), got one with a single "
            f"vocabulary. Leave target_lang out, got {language!r}"
        )
    _check(language, known)
    tokenizer.set_target_lang(language)


def languages_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The languages that a tokenizer has a vocabulary for; none where it has one vocabulary.

    Example
    -------
    >>> languages_of(AutoTokenizer.from_pretrained("facebook/mms-1b-all"))  # doctest: +SKIP
    ['abi', 'abk', ...]
    """
    vocabulary = getattr(tokenizer, "vocab", {})
    return sorted(name for name, tokens in vocabulary.items() if isinstance(tokens, dict))


def _check(language: str, known: Iterable[str]) -> None:
    known = sorted(known)
    if language in known:
        return
    named = known
    if len(known) > MOST_NAMED:
        named = [*difflib.get_close_matches(language, known, n=MOST_NAMED, cutoff=0.0), f"... ({len(known)} in all)"]
    raise UserError(f"target_lang: expected one of {', '.join(named)}, got {language!r}")
