"""Text files to one row of tokens, and a byte-level BPE tokenizer of their own where there is none yet."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cald_speech.errors import UserError
from cald_speech.files import whole_file

END, PADDING, MASK = "<|endoftext|>", "<pad>", "<mask>"
_FILES_AT_ONCE = 64


def train_tokenizer(files: Sequence[Path], vocab_size: int, folder: str | Path) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE (Sennrich et al., arXiv 1508.07909) of ``vocab_size`` tokens from files, and save it.

    Its first three tokens are the end of a text, padding and the mask: it serves causal and masked models alike. The
    same files always give the same tokenizer.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("one two one two")
    >>> tokenizer = train_tokenizer([folder / "a.txt"], 262, folder / "tokenizer")
    >>> tokenizer.decode(tokenizer("two one").input_ids)
    'two one'
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PADDING, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_texts(files), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PADDING, mask_token=MASK
    )
    fast.save_pretrained(folder)
    return fast


def pack_texts(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, path: str | Path) -> tuple[int, str]:
    """Write the tokens of all files, one after the other with the end-of-text token behind each; atomic.

    Returns how many tokens there are, and their dtype: uint16 where the vocabulary fits into it, else uint32.

    Raises: UserError, for a file that is no UTF-8 text, or a tokenizer without an end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "expected a tokenizer with an end-of-text token (eos_token), to stand between texts, got one without. "
            "Set it in tokenizer_config.json"
        )
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    total = 0
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        bar = tqdm(total=len(files), desc="tokenising", unit="file", disable=len(files) < 1000)
        for start in range(0, len(files), _FILES_AT_ONCE):
            texts = list(read_texts(files[start : start + _FILES_AT_ONCE]))
            for tokens in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids:
                row = np.array([*tokens, tokenizer.eos_token_id], dtype=dtype)
                file.write(row.tobytes())
                total += len(row)
            bar.update(len(texts))
        bar.close()
    return total, dtype


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """The texts of the files, one by one. Raises UserError for one that is no UTF-8 text."""
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(
                f"{path}: expected UTF-8 text, but it cannot be decoded ({error}). Convert it, or leave it out with "
                "`exclude` in `corpus`"
            ) from error
