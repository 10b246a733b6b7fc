"""Token files: one long row of token ids on disk, memory-mapped, cut into blocks of equal length to train on.

A set is a JSON file beside or apart from the tokens: {"file": path, "dtype": "uint16", "offset": bytes before the first
token, "first": the first token of the set, "num_tokens": its tokens, "block_tokens": of each block, "vocab_size": ids
are below it, or null, "tokenizer": folder or hub id, or null}.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cald_speech.data.modality import Text
from cald_speech.errors import UserError
from cald_speech.files import whole_file

WIDTHS = {"uint16": 2, "int32": 4, "uint32": 4, "int64": 8}


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
            found = cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: expected a token set in JSON, got {error}. Prepare the data again.") from error
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
