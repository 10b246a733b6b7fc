"""Where models come from: whether one can be had at all, and whether its weights are this model's.

The first is asked once and quickly: transformers would try every file of a model five times. In the second, what does
not fit is named, where transformers would pass over it.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_session, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2Processor,
)
from transformers.utils import logging

from cald_speech.errors import UserError
from cald_speech.families.folder import (
    check_config,
    check_kinds,
    check_processor,
    check_size,
    check_values,
    is_pickled,
    opening,
    stored_weights,
)
from cald_speech.families.languages import write_in

TIMEOUT_S = 10


def check_source(source: str | Path) -> None:
    """Raise UserError unless ``source`` is a folder, a model in the local cache, or one the hub has.

    Example
    -------
    >>> import tempfile
    >>> check_source(tempfile.mkdtemp())
    """
    source = str(source)
    if Path(source).is_dir():
        return
    # The library behind the hub's client has changed its name before; its errors are no OSErrors.
    http = import_module(type(get_session()).__module__.partition(".")[0])
    try:
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().model_info(source, timeout=TIMEOUT_S)
    except HFValidationError as error:
        raise UserError(
            f"there is no folder {source!r}, and it is no Hugging Face hub id (owner/name) either: give a folder with "
            "config.json and model.safetensors, or a hub id"
        ) from error
    except (OSError, HfHubHTTPError, http.HTTPError) as error:
        raise UserError(
            f"there is no folder {source!r}, and the Hugging Face hub cannot be asked for it: "
            f"{str(error).strip().splitlines()[0]}. Without a network, download the model elsewhere (`hf download "
            f"{source}`) and give its folder; `make demo` needs neither"
        ) from error


def load_processor(source: str | Path, target_lang: str | None = None) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor beside a model; of one that carries an n-gram model, the parts that greedy decoding needs.

    ``target_lang`` is the language that it is to write, of those that it has vocabularies for (MMS).

    Raises
    ------
    UserError
        where its files are not there or cannot be read, or it does not know the language.
    """
    check_processor(str(source))
    options = {"trust_remote_code": False}
    try:
        try:
            processor = AutoProcessor.from_pretrained(source, **options)
        except ImportError:  # Wav2Vec2ProcessorWithLM needs packages for its language model
            extractor = AutoFeatureExtractor.from_pretrained(source, **options)
            processor = Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer.from_pretrained(source, **options))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # files of others end in errors of many kinds; tokenizers' panics are no Exceptions
        raise UserError(
            f"{source}: expected the processor's files (preprocessor_config.json, tokenizer_config.json, vocab.json) "
            f"beside the model, but they cannot be loaded: {' '.join(str(error).split())}. Copy them from the model it "
            "was made from, or give a processor"
        ) from error
    if not has_vocabulary(getattr(processor, "tokenizer", None) or processor):
        raise UserError(
            f"{source}: expected a tokenizer's files beside the model (tokenizer.json, or vocab.txt and its kin), got "
            "none. Copy them from the model it was made from, or give a processor"
        )
    if target_lang is not None:
        write_in(processor.tokenizer, target_lang)
    return processor


def has_vocabulary(processor: Any) -> bool:
    """Whether a tokenizer knows more than its special tokens; True for what is none.

    Of a text model's config alone transformers makes a tokenizer without a vocabulary, to which all words are unknown.
    """
    return not isinstance(processor, PreTrainedTokenizerBase) or len(processor) > len(processor.all_special_ids)


def load_checked(
    cls: type[PreTrainedModel],
    source: str,
    *,
    head_names: Sequence[str],
    optional_names: Sequence[str],
    leftover_names: Sequence[str],
    new_head: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """A ``cls`` model from a folder or hub id, in which nothing but a head is new.

    Arguments
    ---------
    head_names : patterns of names, behind the base model's prefix, that may be left over, and missing in the checkpoint
        of a model with another head.
    optional_names : the same for names that may be missing in any checkpoint.
    leftover_names : the same for names that may only be left over.
    new_head : False, for a model that is to be used as it is, refuses a checkpoint without the head's weights.
    options : dtype and the config's values, as ``from_pretrained`` takes them.

    Raises
    ------
    UserError
        where the source cannot be had, or its weights do not fit.
    """
    config = read_config(source, cls.config_class, **options)
    stored = stored_weights(source)
    blank = check_size(cls, config, stored, source)
    prefix = f"{cls.base_model_prefix}."
    kept = _others(stored, prefix, leftover_names)
    # With the base model's prefix or without, as the file's names are.
    integers = {name.removeprefix(prefix) for name, b in blank.named_buffers() if not b.is_floating_point()}
    whole = {name for name in kept if name.removeprefix(prefix) in integers}
    check_kinds({name: stored[name] for name in kept}, whole, source)
    # Other sizes are not ignored: they are named below with all else that does not fit.
    with _quiet(), opening(source, "the model"):
        model, info = cls.from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=not is_pickled(source),
            weights_only=True,
            trust_remote_code=False,
            **options,
        )
    # A parameter that mixers share, and that the checkpoint lacks, has no values but is not told as missing.
    missing = {*info["missing_keys"], *(n for n, p in model.named_parameters() if p.is_meta)}
    mismatched = [f"{k}: {tuple(had)} for {tuple(wanted)}" for k, had, wanted in info["mismatched_keys"]]
    without_head = [name for name in missing if _others([name], prefix, optional_names)]
    if not new_head and without_head and not _others(without_head, prefix, head_names):
        raise UserError(
            f"{source}: expected a model that was trained for this, a {cls.__name__}, got one without its head "
            f"({', '.join(sorted(without_head)[:3])}): what it put out would be chance. Fine-tune it first, or "
            "give one that was"
        )
    same_head = cls.__name__ in (config.architectures or ())
    may_lack = optional_names if same_head else (*head_names, *optional_names)
    may_have = (*head_names, *optional_names, *leftover_names)
    _refuse(source, "missing", _others(missing, prefix, may_lack))
    _refuse(source, "unexpected", _others(info["unexpected_keys"], prefix, may_have))
    _refuse(source, "of another size", mismatched)
    check_values(model, source)
    return model


def read_config(
    source: str, config_class: type[PretrainedConfig] | type[AutoConfig] = AutoConfig, **options: Any
) -> PretrainedConfig:
    """The config of a folder or hub id, with the values that ``options`` set in it; its files have been looked at.

    Raises UserError where there is none, and where what it says is of a wrong kind.
    """
    check_source(source)
    check_config(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config, _ = config_class.from_pretrained(
                source, return_unused_kwargs=True, trust_remote_code=False, **options
            )
    except Exception as error:  # the config's classes check their values in many ways
        raise UserError(
            f"cannot load a model from {source!r}: {' '.join(str(error).split())[:300]} Expected a folder with "
            "config.json and model.safetensors, or a Hugging Face hub id and a network. Without a network, download it "
            "elsewhere (`hf download`) and give the folder"
        ) from error
    return config


def load_processor_part(cls: Any, source: str | Path) -> Any:
    """A processor, tokenizer or feature extractor of this class, from a folder or hub id whose files are looked at.

    Raises UserError where there is none, and where its files hold what no processor can work with.
    """
    check_source(source)
    check_processor(str(source))
    with opening(source, "its processor's files", "Copy them from the model it was made from, or give a processor"):
        return cls.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """No report of transformers' own on what did not fit: its result is read and judged here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _others(names: Sequence[str], prefix: str, patterns: Sequence[str]) -> list[str]:
    """The names that, behind the prefix, begin with none of the patterns."""
    return [name for name in names if not any(re.match(p, name.removeprefix(prefix)) for p in patterns)]


def _refuse(source: str, kind: str, names: Sequence[str]) -> None:
    if names:
        raise UserError(
            f"the weights in {source!r} do not fit this model: {len(names)} {kind} ({', '.join(sorted(names)[:3])}, "
            "...). Expected a checkpoint of the same architecture that config.json describes"
        )
