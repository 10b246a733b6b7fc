"""Text for language models: one long row of token ids on disk, memory-mapped, cut into blocks of equal length.

A set is a JSON file beside or apart from the tokens: {"file": path, "dtype": "uint16", "offset": bytes before the first
token, "first": the first token of the set, "num_tokens": its tokens, "block_tokens": of each block, "vocab_size": ids
are below it, or null, "tokenizer": folder or hub id, or null}.

`pack_texts` makes such a row of text files, `train_tokenizer` a tokenizer for them; `Masking` chooses what a masked
model is to predict.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cald_speech.data.batching import Text
from cald_speech.data.encodings import read_text
from cald_speech.errors import UserError
from cald_speech.files import clear, whole_file

WIDTHS = {"uint16": 2, "int32": 4, "uint32": 4, "int64": 8}
END, PADDING, MASK = "<|endoftext|>", "<pad>", "<mask>"
UNLABELLED = -100  # the label of a token that is not to be predicted
_FILES_AT_ONCE = 64


@dataclass(frozen=True)
class TokenSet:
    """A stretch of a token file, in whole blocks; what is left over at its end is not used.

    Example
    -------
    >>> TokenSet("tokens.bin", num_tokens=100, block_tokens=32).num_blocks
    3
    """

    file: str
    num_tokens: int
    block_tokens: int
    dtype: str = "uint16"
    offset: int = 0
    first: int = 0
    vocab_size: int | None = None
    tokenizer: str | None = None

    @property
    def num_blocks(self) -> int:
        return self.num_tokens // self.block_tokens

    def write(self, path: str | Path) -> None:
        """Write the set's JSON file. Atomic."""
        clear(path)
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "TokenSet":
        """Read and check a set.

        Raises: UserError, for a file that is not there or none of these, tokens of another width, fewer tokens than the
        set says, or not one whole block.
        """
        path = Path(path)
        try:
            found = cls(**json.loads(read_text(path)))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: expected a token set in JSON, got {error}. Prepare the data again.") from error
        numbers = (found.num_tokens, found.block_tokens, found.offset, found.first)
        if (
            not isinstance(found.file, str)
            or any(type(n) is not int or n < 0 for n in numbers)
            or not found.block_tokens
        ):
            raise UserError(
                f"{path}: expected a token set, with counts from 0 on, got {found!r:.200}. Prepare it again."
            )
        if found.dtype not in WIDTHS:
            raise UserError(f"{path}: dtype: expected one of {', '.join(WIDTHS)}, got {found.dtype!r}")
        if not Path(found.file).is_file():
            raise UserError(f"{path}: the tokens are not there: {found.file}. Prepare the data again.")
        size = Path(found.file).stat().st_size - found.offset
        wanted = (found.first + found.num_tokens) * WIDTHS[found.dtype]
        if size < wanted:
            raise UserError(
                f"{found.file}: expected at least {wanted} bytes of {found.dtype} tokens, got {size}: it is cut off, "
                "or its tokens are of another width. Copy it again, or correct `dtype` in `corpus`"
            )
        if found.num_blocks < 1:
            raise UserError(
                f"{path}: {found.num_tokens} tokens do not fill one block of {found.block_tokens}. Give more text, or "
                "shorter blocks (block_tokens in `corpus`)"
            )
        return found

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what is in the set, of its first and last block's tokens, and of no path."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("file", "tokenizer", "offset")}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        blocks = TokenBlocks(self)
        for place in (0, len(blocks) - 1):
            digest.update(blocks.tokens(place).numpy().tobytes())
        return digest.hexdigest()


class TokenBlocks(Dataset):
    """Items {"id", "tokens" (block_tokens,) int64} of a token set; what is not read stays on disk."""

    def __init__(self, tokens: TokenSet):
        self.set = tokens

    @cached_property
    def _mapped(self) -> np.memmap:
        of = self.set
        return np.memmap(of.file, dtype=of.dtype, mode="r", offset=of.offset)

    def __len__(self) -> int:
        return self.set.num_blocks

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        return {"id": str(place), "tokens": self.tokens(place)}

    def tokens(self, place: int) -> Tensor:
        """One block. Raises UserError for ids that the vocabulary does not have."""
        start = self.set.first + place * self.set.block_tokens
        block = self._mapped[start : start + self.set.block_tokens].astype(np.int64)
        limit = self.set.vocab_size
        if limit is not None and not 0 <= block.min() <= block.max() < limit:
            raise UserError(
                f"{self.set.file}: expected token ids below {limit}, the size of the vocabulary, got {block.max()} in "
                f"block {place}: the tokens are of another tokenizer, or of another width than {self.set.dtype}"
            )
        return torch.from_numpy(block)


class Tokens(Text):
    """Text that comes in blocks of tokens, all of one length."""

    def sizes(self, dataset: TokenBlocks) -> list[float]:
        return [float(dataset.set.block_tokens)] * len(dataset)

    def fingerprint(self, manifest: Path) -> str:
        return TokenSet.read(manifest).fingerprint()


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


@dataclass(frozen=True)
class Masking:
    """Chooses and masks tokens; the same seed always chooses the same.

    Example
    -------
    >>> masked = Masking(0.5, mask_token=9, vocab_size=9)(torch.arange(8), seed=0)
    >>> chosen = masked["labels"] != UNLABELLED
    >>> torch.equal(masked["labels"][chosen], torch.arange(8)[chosen])
    True
    """

    share: float
    mask_token: int
    vocab_size: int
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, share: float) -> "Masking":
        """Raises UserError for a tokenizer without a mask token."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                "expected a tokenizer with a mask token, for masked language modelling, got one without. Give an "
                "encoder's (RoBERTa, BERT), or train a causal model"
            )
        return cls(share, tokenizer.mask_token_id, len(tokenizer), tuple(sorted(tokenizer.all_special_ids)))

    def __call__(self, tokens: Tensor, *, seed: int) -> dict[str, Tensor]:
        """``tokens`` (T,) masked, and ``labels`` (T,): what was there, UNLABELLED where nothing was chosen."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        draw = lambda: torch.rand(tokens.shape, generator=generator)  # noqa: E731
        chosen = (draw() < self.share) & ~torch.isin(tokens, torch.tensor(self.special, dtype=torch.long))
        fate = draw()
        others = torch.randint(self.vocab_size, tokens.shape, generator=generator)
        masked = torch.where(chosen & (fate < 0.8), self.mask_token, tokens)
        masked = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), others, masked)
        return {"tokens": masked, "labels": tokens.masked_fill(~chosen, UNLABELLED)}


class MaskedBlocks(TokenBlocks):
    """Items {"id", "tokens", "labels", "plain"}: a block masked by its place, and as it was."""

    def __init__(self, tokens: TokenSet, masking: Masking):
        super().__init__(tokens)
        self.masking = masking

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        plain = self.tokens(place)
        return {"id": str(place), "plain": plain} | self.masking(plain, seed=place)


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
