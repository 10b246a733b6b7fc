"""Tables of text: sentences, or pairs of them, with a label; what a text classifier is trained or tested on.

A table is a file of JSON lines, {"text": first sentence, "pair": second sentence or null, "label": name}; a row's id is
its place. `TokenisedTable` is one as tokens.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cald_speech.data.batching import Text
from cald_speech.data.encodings import read_text
from cald_speech.errors import UserError
from cald_speech.files import clear, once, whole_file

logger = logging.getLogger(__name__)
_ROWS_AT_ONCE = 4096


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with ``text``, ``label`` and, perhaps, ``pair``. Atomic.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> write_table(path, [{"text": "it works", "label": "positive"}])
    >>> read_table(path)
    {'0': {'text': 'it works', 'pair': None, 'label': 'positive'}}
    """
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            line = {"text": row["text"], "pair": row.get("pair"), "label": row["label"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_table(path: str | Path) -> dict[str, dict[str, Any]]:
    """The rows of a table by their ids.

    Raises: UserError, naming file and line, where there is no table, no row, or a row that is none.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such table. Prepare the data first, or correct the path.")
    lines = read_text(path, "a table of JSON lines").removesuffix("\n").split("\n")
    rows = {str(number): _row(path, number + 1, line) for number, line in enumerate(lines) if line or len(lines) > 1}
    if not rows:
        raise UserError(f"{path}: expected at least one row, but there is none. Prepare the data again.")
    return rows


def table_hash(path: str | Path) -> str:
    """SHA-256 (hex) over the rows. Raises: UserError, as `read_table`."""
    digest = hashlib.sha256()
    for row in read_table(path).values():
        digest.update(json.dumps([row["text"], row["pair"], row["label"]]).encode() + b"\n")
    return digest.hexdigest()


def write_tables_once(
    tables: Mapping[str, str | Path],
    sources: Sequence[Path],
    make: Callable[[], Mapping[str, Iterable[Mapping[str, Any]]]],
    **settings: Any,
) -> None:
    """Write what ``make()`` returns, the rows of each of the ``tables`` by its name, unless they stand there already.

    They are made again where a ``source`` changed (name, size, time), or the ``settings`` (JSON values) that ``make``
    depends on, or a table was edited.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> for text in ("first", "second"):
    ...     write_tables_once({"train": path}, [], lambda: {"train": [{"text": text, "label": "yes"}]}, seed=0)
    >>> read_table(path)["0"]["text"]
    'first'
    """
    paths = {name: Path(path) for name, path in tables.items()}
    first = next(iter(paths.values()))
    record = first.with_name(f".{first.stem}.prepared")
    stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    made_of = hashlib.sha256(json.dumps([stats, settings], sort_keys=True).encode()).hexdigest()

    def is_made() -> bool:
        return _recorded(record) == {"of": made_of, "tables": _file_hashes(paths)}

    def write() -> None:
        rows = make()
        for name, path in paths.items():
            clear(path)
            write_table(path, rows[name])
        clear(record)
        with whole_file(record) as unfinished:
            unfinished.write_text(json.dumps({"of": made_of, "tables": _file_hashes(paths)}))

    once(first.parent, first.stem, is_made, write)


class TokenisedTable(Dataset):
    """A table with its texts as tokens, all made once, here. An item has "id" (str), "tokens" and "token_types" ((N,)
    int64), "labels" ((1,) int64) and "text" (str: the label's name).

    Arguments
    ---------
    path : of the table. Its rows are single sentences, or all of them pairs.
    tokenizer : puts its own special tokens around and between the sentences.
    places : each label's name with the place of its output.
    max_tokens : longer inputs are cut, the longer sentence of a pair first; how many is logged.

    Raises: UserError, with file and line, for a label that is not in ``places`` or a row without the second sentence
    that others have; for a ``max_tokens`` that leaves no room for text; and as `read_table`.

    Example
    -------
    >>> import tempfile
    >>> from cald_speech.data.tokens import train_tokenizer
    >>> from cald_speech.data.tables import write_table
    >>> table = Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> write_table(table, [{"text": "good", "label": "yes"}])
    >>> tokenizer = train_tokenizer([table], 260, table.parent / "tokenizer")
    >>> item = TokenisedTable(table, tokenizer, {"no": 0, "yes": 1}, max_tokens=8)[0]
    >>> tokenizer.decode(item["tokens"]), item["labels"].tolist(), item["text"]
    ('good', [1], 'yes')
    """

    def __init__(
        self, path: str | Path, tokenizer: PreTrainedTokenizerBase, places: Mapping[str, int], *, max_tokens: int
    ):
        rows = list(read_table(path).values())
        _check(Path(path), rows, places)
        self.names, in_pairs = list(places), rows[0]["pair"] is not None
        if max_tokens <= tokenizer.num_special_tokens_to_add(pair=in_pairs):
            raise UserError(f"max_tokens: expected more than the tokenizer's special tokens take, got {max_tokens}")
        self.labels = np.array([places[row["label"]] for row in rows], dtype=np.int32)
        tokens, types, lengths, uncut = [], [], [], []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = rows[start : start + _ROWS_AT_ONCE]
            sentences = [[row[key] for row in chunk] for key in (("text", "pair") if in_pairs else ("text",))]
            ids, its_types = _encoded(tokenizer, sentences, max_tokens, uncut)
            tokens.append(np.array(list(chain.from_iterable(ids)), dtype=np.int32))
            types.append(np.array(list(chain.from_iterable(its_types)), dtype=np.int8))
            lengths += [len(row) for row in ids]
        # In one piece each, a token takes 5 bytes; as lists of Python integers it would take 16.
        self.tokens, self.token_types = np.concatenate(tokens), np.concatenate(types)
        self.num_tokens = np.array(lengths)
        self.ends = self.num_tokens.cumsum()
        cut = sum(length > max_tokens for length in uncut)
        if cut:
            logger.warning(
                "%s: %d of %d rows are longer than %d tokens (max_tokens) and were cut; the longest has %d",
                *(path, cut, len(rows), max_tokens, max(uncut)),
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        own = slice(self.ends[place] - self.num_tokens[place], self.ends[place])
        return {
            "id": str(place),
            "tokens": torch.from_numpy(self.tokens[own].astype(np.int64)),
            "token_types": torch.from_numpy(self.token_types[own].astype(np.int64)),
            "labels": torch.tensor([int(self.labels[place])]),
            "text": self.names[self.labels[place]],
        }


class Sentences(Text):
    """Items that say which of a pair's sentences a token belongs to, where their tokenizer does, as BERT's."""

    def sizes(self, dataset: TokenisedTable) -> list[float]:
        return dataset.num_tokens.tolist()

    def fingerprint(self, manifest: Path) -> str:
        return table_hash(manifest)

    def arguments(self, batch: PaddedBatch, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
        arguments, lengths = super().arguments(batch, model)
        types = batch.token_types.data
        if types.any():  # zeros are what a model takes where it is told none
            known = getattr(model.config, "type_vocab_size", 1)  # causal models have no such embeddings
            if types.max() >= known:
                raise UserError(
                    f"the tokenizer tells the two sentences of a pair apart by token types up to {int(types.max())}, "
                    f"and {type(model).__name__} has embeddings for {known}: expected the model's own tokenizer. Give "
                    "it with --processor"
                )
            arguments["token_type_ids"] = types.to(model.device)
        return arguments, lengths


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        texts, label = (row["text"], row["pair"]), row["label"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: expected text, pair and label as JSON, got {line[:80]!r}") from error
    if not (isinstance(texts[0], str) and isinstance(texts[1], str | None) and isinstance(label, str)):
        raise UserError(f"{path}, line {number}: expected text, pair (or null) and label in words, got {line[:80]!r}")
    return {"text": texts[0], "pair": texts[1], "label": label}


def _recorded(record: Path) -> Any:
    """What was written of the last preparation; None where there is none, or it is damaged."""
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None


def _file_hashes(paths: Mapping[str, Path]) -> dict[str, str | None]:
    read = {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}
    return {name: None if of_one is None else hashlib.sha256(of_one).hexdigest() for name, of_one in read.items()}


def _check(path: Path, rows: Sequence[Mapping[str, Any]], places: Mapping[str, int]) -> None:
    """A row's line in the file is its place, counted from one."""
    strange = [(number, row["label"]) for number, row in enumerate(rows, start=1) if row["label"] not in places]
    if strange:
        number, label = strange[0]
        raise UserError(
            f"{path}, line {number}: expected a label of {', '.join(places)}, got {label!r} ({len(strange)} such "
            "rows). Correct `labels` of the task in the yaml, or prepare the data again"
        )
    first = rows[0]["pair"] is None
    for number, row in enumerate(rows, start=1):
        if (row["pair"] is None) != first:
            wanted, got = ("one sentence", "a pair") if first else ("a pair", "one sentence")
            raise UserError(
                f"{path}, line {number}: expected {wanted}, as on line 1, got {got}. Prepare the data again"
            )


def _encoded(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[list[str]], max_tokens: int, uncut: list[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and types of each row; how many they were before anything was cut is added to ``uncut``."""
    with_types = "token_type_ids" in tokenizer.model_input_names
    options = {"return_token_type_ids": with_types, "return_attention_mask": False}
    ids, types = _call(tokenizer, sentences, **options, verbose=False)
    uncut += [len(row) for row in ids]
    long = [place for place, row in enumerate(ids) if len(row) > max_tokens]
    if long:
        chosen = [[texts[place] for place in long] for texts in sentences]
        cut = _call(tokenizer, chosen, **options, truncation=True, max_length=max_tokens)
        for place, its_ids, its_types in zip(long, *cut, strict=True):
            ids[place], types[place] = its_ids, its_types
    return ids, types


def _call(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[list[str]], **options) -> tuple[list, list]:
    encoded = tokenizer(*sentences, **options)
    ids = encoded["input_ids"]
    return ids, encoded["token_type_ids"] if options["return_token_type_ids"] else [[0] * len(row) for row in ids]
