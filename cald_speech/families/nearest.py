"""What a user is told whose architecture is not known here: the nearest one that is, and how to add another."""

import difflib
from collections.abc import Collection

from cald_speech.errors import UserError

# Hugging Face's model type, the known one whose layers are laid out most alike, and what is in the way, if it is known.
RELATIVES = {
    "sew-d": ("sew", "its attention is DeBERTa's: positions are part of every score"),
    "seamless_m4t": ("wav2vec2-bert", "its speech encoder is a part of a model that translates"),
    "lasr_ctc": ("parakeet_ctc", "its features and the positions in its attention are others"),
    "parakeet_encoder": ("parakeet_ctc", "it is that encoder without a head: give the model with the CTC head"),
    "parakeet_rnnt": ("parakeet_ctc", "its decoder is a transducer, which hears its own last word"),
    "parakeet_tdt": ("parakeet_ctc", "its decoder is a transducer, which hears its own last word"),
    "mctct": ("wav2vec2-bert", "its features are others"),
    "albert": ("bert", "its layers are one layer, used again and again"),
    "camembert": ("roberta", ""),
    "data2vec-text": ("roberta", ""),
    "deberta": ("bert", "positions are part of every score of its attention"),
    "deberta-v2": ("bert", "positions are part of every score of its attention"),
    "electra": ("bert", ""),
    "ernie": ("bert", ""),
    "falcon": ("gpt_neox", ""),
    "gemma": ("llama", ""),
    "gemma2": ("llama", ""),
    "gpt_neo": ("gpt2", ""),
    "gptj": ("gpt_neox", ""),
    "mpnet": ("bert", ""),
    "olmo": ("llama", ""),
    "opt": ("gpt_neox", ""),
    "phi": ("gpt_neox", ""),
    "phi3": ("llama", ""),
    "xlm-roberta-xl": ("xlm-roberta", ""),
}


def unknown(model_type: str, known: Collection[str]) -> UserError:
    """The error for an architecture that is none of the ``known`` ones.

    Example
    -------
    >>> print(unknown("wav2vec", ["bert", "wav2vec2"]))
    the architecture 'wav2vec' is not known: expected one of bert, wav2vec2. The nearest is wav2vec2. A family is one \
file beside cald_speech/families/hubert.py: "How to add" in CONTRIBUTING.md says how to write it
    """
    nearest, hurdle = RELATIVES.get(model_type, ("", ""))
    if nearest not in known:
        nearest, hurdle = next(iter(difflib.get_close_matches(model_type, known, n=1)), ""), ""
    hint = f" The nearest is {nearest}{': ' + hurdle if hurdle else ''}." if nearest else ""
    return UserError(
        f"the architecture {model_type!r} is not known: expected one of {', '.join(sorted(known))}.{hint} A family is "
        'one file beside cald_speech/families/hubert.py: "How to add" in CONTRIBUTING.md says how to write it'
    )
