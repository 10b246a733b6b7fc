"""Text to token sets: the pre-shuffled Pile's memory-mapped files, or any folder of plain text, tokenised and packed.

<data_folder>/*.bin[, *.idx]     rows of 2,049 tokens as Pythia read them (EleutherAI/pile-standard-pythia-preshuffled)
<data_folder>/**/*.txt           plain text; `pattern` and `exclude` choose other files
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cald_speech.data.tokens import TokenSet, pack_texts, train_tokenizer
from cald_speech.errors import UserError
from cald_speech.files import once, sweep, whole_file
from cald_speech.recipes.pile.megatron import split_token_file
from cald_speech.tasks.processors import tokenizer_of

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_WAY_OUT = (
    "The pre-shuffled Pile is at huggingface.co/datasets/EleutherAI/pile-standard-pythia-preshuffled: download its "
    "first document-*.bin and pass the folder as --data_folder. A folder of plain text will do as well."
)


def prepare(
    data_folder: Path,
    output_folder: Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    block_tokens: int = 2049,
    num_train_tokens: int | None = None,
    num_held_out_tokens: int = 2049 * 500,
    dtype: str = "uint16",
    pattern: str = "**/*.txt",
    exclude: Sequence[str] = (),
    held_out_share: float = 0.02,
) -> dict[str, Path]:
    """Write the token sets of train, valid and test, and return {name: its JSON file}.

    Arguments
    ---------
    tokenizer : folder or hub id; of a folder of text it makes the tokens, of token files it is what made them. None
        learns one of ``vocab_size`` tokens from the training texts.
    vocab_size : token ids are below it, which is checked as blocks are read; default: the tokenizer's size.
    block_tokens : length of what the model is shown at once; one more than it predicts.
    num_train_tokens : so many of the training set, from its beginning; None takes all.
    num_held_out_tokens : for valid and for test each, of the end of a token file.
    dtype : of token files without an index beside them.
    pattern, exclude : which text files, as a glob, and parts of a path (folders, names) that are left out.
    held_out_share : of the text files, for valid and for test each, chosen by a hash of their names.

    Raises: UserError, where there is no text and no token file, or what is there is too little or of another width.
    """
    data_folder, folder = Path(data_folder).absolute(), Path(output_folder) / "manifests"
    if not data_folder.is_dir():
        raise UserError(f"expected text or token files in {data_folder}, but there is no such folder. {_WAY_OUT}")
    binaries = sorted(data_folder.glob("*.bin"))
    if binaries:
        size = len(tokenizer_of((), tokenizer)) if vocab_size is None and tokenizer is not None else vocab_size
        like = TokenSet("", 0, block_tokens, dtype, vocab_size=size, tokenizer=tokenizer)
        sets = split_token_file(binaries[0], like, num_held_out_tokens)
        if len(binaries) > 1:
            logger.warning("%s alone is read of %d token files: join them first", binaries[0], len(binaries))
    else:
        files = _chosen(data_folder, pattern, exclude)
        sets = _of_texts(data_folder, files, folder.parent, tokenizer, vocab_size, block_tokens, held_out_share)
    if num_train_tokens is not None:
        if num_train_tokens > sets["train"].num_tokens:
            raise UserError(
                f"num_train_tokens: expected at most the {sets['train'].num_tokens:,} that are there, got "
                f"{num_train_tokens:,}. Get more, or leave it out. {_WAY_OUT}"
            )
        sets["train"] = replace(sets["train"], num_tokens=num_train_tokens)
    for name, tokens in sets.items():
        tokens.write(folder / f"{name}.json")
        TokenSet.read(folder / f"{name}.json")  # refuses what no model can be trained on
    return {name: folder / f"{name}.json" for name in sets}


# --- text ------------------------------------------------------------------------------------------------------------


def _chosen(data_folder: Path, pattern: str, exclude: Sequence[str]) -> list[Path]:
    """The text files, sorted."""
    left_out = set(exclude)
    relative = [path.relative_to(data_folder) for path in data_folder.glob(pattern) if path.is_file()]
    files = sorted(data_folder / path for path in relative if not left_out & set(path.parts))
    if not files:
        raise UserError(f"expected token files (*.bin) or text ({pattern}) in {data_folder}, found neither. {_WAY_OUT}")
    return files


def _of_texts(
    root: Path,
    files: Sequence[Path],
    output: Path,
    tokenizer: str | None,
    vocab_size: int | None,
    block_tokens: int,
    share: float,
) -> dict[str, TokenSet]:
    """Tokens are made once for the same files, tokenizer and shares."""
    by_split: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for path in files:
        by_split[_split_of(str(path.relative_to(root)), share)].append(path)
    empty = [name for name, chosen in by_split.items() if not chosen]
    if empty:
        raise UserError(f"no file of {len(files)} fell to {', '.join(empty)}: give more files, or raise held_out_share")
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    settings = json.dumps({"files": stats, "tokenizer": tokenizer, "vocab_size": vocab_size, "share": share})
    made = output / "tokens" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    once(made, "done", (made / "done.json").is_file, partial(_make_tokens, made, by_split, tokenizer, vocab_size))
    done = json.loads((made / "done.json").read_text())
    of = {"vocab_size": done["vocab_size"], "tokenizer": tokenizer or str(made / "tokenizer")}
    return {
        name: TokenSet(str(made / f"{name}.bin"), count, block_tokens, dtype, **of)
        for name, (count, dtype) in done["counts"].items()
    }


def _make_tokens(made: Path, by_split: Mapping[str, Sequence[Path]], tokenizer: str | None, vocab_size: int | None):
    sweep(made)
    found = _tokenizer(tokenizer, vocab_size, by_split["train"], made / "tokenizer")
    counts = {name: pack_texts(chosen, found, made / f"{name}.bin") for name, chosen in by_split.items()}
    with whole_file(made / "done.json") as unfinished:
        unfinished.write_text(json.dumps({"counts": counts, "vocab_size": len(found)}))
    logger.info("%s", ", ".join(f"{name}: {count:,} tokens" for name, (count, _) in counts.items()))


def _tokenizer(
    name: str | None, vocab_size: int | None, files: Sequence[Path], folder: Path
) -> PreTrainedTokenizerBase:
    if name is not None:
        return tokenizer_of((), name)
    if vocab_size is None:
        raise UserError(
            "expected a tokenizer (folder or hub id) or a vocab_size to learn one of, in `corpus`; got none"
        )
    return train_tokenizer(files, vocab_size, folder)


def _split_of(name: str, share: float) -> str:
    """A file's split depends on its name alone: it stays where it is whatever else there is."""
    place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10_000 / 10_000
    return "valid" if place < share else "test" if place < 2 * share else "train"
