"""Megatron's token files (the Pile as Pythia read it), and the index that may lie beside one.

An index begins with MMIDIDX and two zero bytes, a uint64 version (1), a byte for the dtype, the uint64 numbers of rows
and of documents + 1, then the int32 length of each row.
"""

import logging
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cald_speech.data.tokens import WIDTHS, TokenSet
from cald_speech.errors import UserError

logger = logging.getLogger(__name__)

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float32", 7: "float64", 8: "uint16"}


@dataclass(frozen=True)
class Index:
    """What a token file holds: ``dtype`` of a token, ``num_rows``, and ``row_tokens``, 0 where rows differ."""

    dtype: str
    num_rows: int
    row_tokens: int


def read_index(path: str | Path) -> Index:
    """Read an index file. Raises: UserError, where it is none of this kind, or cut off."""
    path = Path(path)
    with path.open("rb") as file:
        header = file.read(len(MAGIC) + 25)
    if len(header) < len(MAGIC) + 25 or not header.startswith(MAGIC):
        raise UserError(f"{path}: expected a Megatron index, which begins with MMIDIDX, got {header[:9]!r}")
    version, code, num_rows, _ = struct.unpack_from("<QBQQ", header, len(MAGIC))
    if version != 1 or code not in DTYPES:
        raise UserError(f"{path}: expected version 1 and a dtype from 1 to 8, got version {version}, dtype {code}")
    if path.stat().st_size < len(header) + 4 * num_rows:
        raise UserError(f"{path}: it is cut off: expected the lengths of {num_rows} rows. Copy it again")
    lengths = np.memmap(path, dtype="<i4", mode="r", offset=len(header), shape=(num_rows,))
    equal = num_rows and lengths.min() == lengths.max()
    return Index(DTYPES[code], num_rows, int(lengths[0]) if equal else 0)


def split_token_file(path: Path, like: TokenSet, num_held_out_tokens: int) -> dict[str, TokenSet]:
    """The rows of a token file as train, valid and test: of its end, ``num_held_out_tokens`` each for the latter two.

    like : block length, dtype (an index beside the file knows better) and vocabulary of the sets.

    Raises: UserError, for tokens of another width, rows of another length, or too few of them.
    """
    index, block_tokens, dtype = path.with_suffix(".idx"), like.block_tokens, like.dtype
    if index.is_file():
        found = read_index(index)
        dtype = found.dtype
        if found.row_tokens not in (0, block_tokens):
            raise UserError(
                f"block_tokens: expected {found.row_tokens}, the length of the rows in {path}, got {block_tokens}"
            )
    if dtype not in WIDTHS:
        raise UserError(f"dtype: expected one of {', '.join(WIDTHS)}, got {dtype!r} for {path}")
    rows = path.stat().st_size / WIDTHS[dtype] / block_tokens
    if not rows.is_integer():
        raise UserError(
            f"{path}: expected whole rows of {block_tokens} {dtype} tokens, and its bytes are {rows:.2f} of them: it "
            "is cut off, or of another width. Correct `dtype` or `block_tokens` in `corpus`, or copy it again"
        )
    if index.is_file() and rows != found.num_rows:
        logger.warning(
            "%s lists %d rows, and %s holds %d: a shard of the whole, or cut off", *(index, found.num_rows, path, rows)
        )
    held_out = num_held_out_tokens // block_tokens * block_tokens
    first = int(rows) * block_tokens - 2 * held_out
    if first < block_tokens or not held_out:
        raise UserError(
            f"num_held_out_tokens: {path} has {int(rows):,} rows of {block_tokens} tokens, and {num_held_out_tokens:,} "
            "for valid and for test each leave too few. Give a larger file, or hold out between one row and fewer"
        )
    train = replace(like, file=str(path), dtype=dtype, num_tokens=first)
    held = {"valid": first, "test": first + held_out}
    return {"train": train} | {n: replace(train, first=f, num_tokens=held_out) for n, f in held.items()}
