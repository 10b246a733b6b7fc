"""A model folder is data, from whom it may come: what its files say is looked at before code believes it.

Sizes are compared with the weights that are there before memory is taken for them; nothing in a folder is imported or
run, and of PyTorch's own files nothing but tensors is unpickled. Everything that is wrong is one UserError, which names
the file and the key.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from cald_speech.errors import UserError, some_of
from cald_speech.files import is_pointer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
PROCESSOR_FILES += ("special_tokens_map.json", "added_tokens.json", "vocab.json")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
REFUSED_KEYS = {  # what would have transformers load something other than the folder's model.safetensors
    "quantization_config": "quantised weights cannot be converted; give the model as it was before",
    "transformers_weights": "the weights are those in model.safetensors; remove the key",
}
MOST_BYTES = 2**27
MOST_DEPTH = 32
MOST_LAYERS = 1024
MOST_LABELS = 2**20
MOST_BEYOND_WEIGHTS = 2**24  # numbers that a model may have beyond twice its weights: heads that are new
FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
# What safetensors calls the floating dtypes that PyTorch's own files hold.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# What a processor's files may say, where what they feed would find out too late.
PROCESSOR_KEYS: dict[str, tuple[type | tuple[type, ...], str, Any]] = {
    "sampling_rate": (int, "samples a second from 1,000 to 768,000", lambda v: 1_000 <= v <= 768_000),
    "feature_size": (int, "a size from 1 to 4,096", lambda v: 1 <= v <= 4096),
    "num_mel_bins": (int, "a size from 1 to 4,096", lambda v: 1 <= v <= 4096),
    "n_fft": (int, "a size from 1 to 65,536", lambda v: 1 <= v <= 65_536),
    "hop_length": (int, "samples from 1 to 65,536", lambda v: 1 <= v <= 65_536),
    "win_length": (int, "samples from 1 to 65,536", lambda v: 1 <= v <= 65_536),
    "padding_value": ((int, float), "a finite number", math.isfinite),
    "do_normalize": (bool, "true or false", lambda v: True),
    "return_attention_mask": (bool, "true or false", lambda v: True),
    "padding_side": (str, "left or right", lambda v: v in ("left", "right")),
    "word_delimiter_token": (str, "a token", lambda v: bool(v)),
    "replace_word_delimiter_char": (str, "a character", lambda v: True),
    "do_lower_case": (bool, "true or false", lambda v: True),
}


def find_file(source: str, name: str) -> Path | None:
    """A file of a folder or hub id; None where there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    with opening(source, name):
        found = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    return None if found is None else Path(found)


@contextmanager
def opening(source: str | Path, what: str, way_out: str = "Copy the folder again, or take another") -> Iterator[None]:
    """Whatever reading untrusted files raises, as a UserError: libraries of others have errors of many kinds."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizers' panics are no Exceptions
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: {what} cannot be used: {type(error).__name__}: {said}. {way_out}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file. Raises UserError for what is no object, not finite, too large or too deeply nested."""
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: expected up to {MOST_BYTES:,} bytes of JSON, got {path.stat().st_size:,}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a valid JSON file: {error}. Copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, got {_shown(values)}")
    for key, value in values.items():
        _check_depth(value, f"{path}: {key}")
    return values


def _check_depth(value: Any, place: str) -> None:
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise UserError(f"{place}: expected values nested up to {MOST_DEPTH} deep, got more")
        if any(isinstance(v, float) and not math.isfinite(v) for v in level):
            raise UserError(f"{place}: expected finite numbers, got NaN or infinity")
        level = [w for v in level if isinstance(v, dict | list) for w in (v.values() if isinstance(v, dict) else v)]
        depth += 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


# --- config.json ------------------------------------------------------------------------------------------------------


def check_config(source: str) -> None:
    """Raise UserError, which names the key, for a config.json of wrong kinds, or of sizes that no model has."""
    path = find_file(source, CONFIG)
    if path is None:
        return  # transformers says so
    if find_file(source, ADAPTER) is not None:
        raise UserError(
            f"{source}: expected a model, got a PEFT adapter beside one ({ADAPTER}), which names another model. Merge "
            "it into its model with merge_and_unload(), and save that"
        )
    values = read_json(path)
    model_type = values.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise UserError(f"{path}: model_type: expected the name of an architecture, got {_shown(model_type)}")
    if values.get("auto_map") is not None and model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{path}: model_type: expected an architecture that is known here, got {_shown(model_type)}. The folder "
            "has Python of its own for it (auto_map), which is not run"
        )
    architectures = values.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise UserError(f"{path}: architectures: expected a list of names, got {_shown(architectures)}")
    for key, reason in REFUSED_KEYS.items():
        if values.get(key) is not None:
            raise UserError(f"{path}: {key}: {reason}")
    for key in ("attn_implementation", "_attn_implementation"):
        if values.get(key) not in (None, *ATTENTIONS):
            raise UserError(f"{path}: {key}: expected one of {', '.join(ATTENTIONS)}, got {_shown(values[key])}")
    for key in ("id2label", "label2id"):
        _check_labels(values.get(key), f"{path}: {key}")
    for key, expected in _defaults(model_type).items():
        if key in values:
            _check_number(values[key], expected, key, path)
    layer_map = values.get("layer_map")
    if layer_map is not None and not isinstance(layer_map, dict):
        raise UserError(f"{path}: layer_map: expected keys and values, got {_shown(layer_map)}")


def _defaults(model_type: str | None) -> Mapping[str, Any]:
    if model_type not in CONFIG_MAPPING:
        return {}
    return {"num_labels": 2, **CONFIG_MAPPING[model_type]().to_dict()}


def _check_labels(labels: Any, place: str) -> None:
    if labels is None:
        return
    if not isinstance(labels, dict) or len(labels) > MOST_LABELS:
        raise UserError(f"{place}: expected up to {MOST_LABELS:,} labels by their numbers, got {_shown(labels)}")


def _check_number(value: Any, default: Any, key: str, path: Path) -> None:
    """Counts and sizes: whole, not negative where the usual one is not, and of a size that something real has.

    A config of parts has them under the parts' names.
    """
    if isinstance(value, dict) and isinstance(default, dict) and key.endswith("_config"):
        for name in value.keys() & default.keys():
            _check_number(value[name], default[name], f"{key}.{name}", path)
        return
    if isinstance(value, list):
        if len(value) > MOST_LAYERS:
            raise UserError(f"{path}: {key}: expected up to {MOST_LAYERS} values, got {len(value):,}")
        usual = default[0] if isinstance(default, list | tuple) and len(default) else None
        for entry in value:
            if not isinstance(entry, list):
                _check_number(entry, usual, key, path)
        return
    if not isinstance(value, int) or isinstance(value, bool):
        return  # other kinds are checked by the config's own class
    counts = key.endswith("layers") or key.startswith("num_hidden")
    most = MOST_LABELS if key == "num_labels" else MOST_LAYERS if counts else 2**31
    least = 1 if isinstance(default, int) and default >= 1 and not key.endswith("_id") else 0
    if key.endswith("_id") or (isinstance(default, int | float) and default < 0) or default is None:
        least = -(2**31)
    if not least <= value <= most:
        raise UserError(f"{path}: {key}: expected a number from {least} to {most:,}, got {_shown(value)}")


# --- the weights ------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor in a file: its dtype as safetensors calls it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def stored_weights(source: str) -> dict[str, Stored]:
    """What the weights' files of a folder or hub id hold, without reading it.

    Raises UserError where there are none, and where they are damaged.
    """
    if is_pickled(source):
        return _pickled_weights(source)
    single = find_file(source, WEIGHTS)
    names = {WEIGHTS} if single else _shards(source)
    stored = {}
    for name in sorted(names):
        path = find_file(source, name)
        if path is None:
            raise UserError(f"{source}: {INDEX} names {name}, which is not there. Copy the folder again")
        _refuse_pointer(path)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, it is no dict
                    piece = file.get_slice(key)
                    stored[key] = Stored(piece.get_dtype(), tuple(piece.get_shape()))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"the weights in {source!r} cannot be read: {error}. Expected whole safetensors files, these are "
                "truncated or damaged. Copy the folder again, or take an earlier checkpoint"
            ) from error
    return stored


def _refuse_pointer(path: Path) -> None:
    if is_pointer(path):
        raise UserError(
            f"{path}: expected weights, got Git LFS's pointer to them: fetch them with `git lfs pull` there, or "
            "download the model with `hf download`"
        )


def _shards(source: str) -> set[str]:
    index = find_file(source, INDEX)
    if index is None:
        raise UserError(f"{source}: expected weights in {WEIGHTS}, got none. Copy the folder again")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map: expected the file of each weight, got {_shown(names)}")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map: expected names of safetensors files here, got {_shown(name)}")
    return set(names.values())


def is_pickled(source: str) -> bool:
    """Whether the weights are PyTorch's pickles alone, as in older folders (HuBERT's and WavLM's on the hub)."""
    return not any(find_file(source, name) for name in (WEIGHTS, INDEX)) and any(find_file(source, n) for n in PICKLES)


def _pickled_weights(source: str) -> dict[str, Stored]:
    """As :func:`stored_weights`: nothing but tensors is unpickled, and no values are read."""
    path = find_file(source, PICKLES[0])
    paths = [path] if path else []
    if not paths:
        names = read_json(find_file(source, PICKLES[1])).get("weight_map")
        names = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{source}: {PICKLES[1]}: weight_map: expected the file of each weight")
        paths = [find_file(source, name) for name in names]
    stored = {}
    for path in paths:
        if path is not None:
            _refuse_pointer(path)
        try:
            weights = torch.load(path, map_location="meta", weights_only=True)
            stored |= {name: Stored(_DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in weights.items()}
        except Exception as error:  # unpickling damage fails in many ways
            # torch's own words advise to load it all the same, whatever it may do.
            said = "" if isinstance(error, UnpicklingError) else f" ({' '.join(str(error).split())[:200]})"
            raise UserError(
                f"{path or source}: expected tensors and nothing else in PyTorch's file of weights, got one that "
                f"is damaged or has more than these{said}. Copy the folder again, or take one with {WEIGHTS}"
            ) from error
    return stored


def check_size(
    cls: type[PreTrainedModel], config: PretrainedConfig, stored: Mapping[str, Stored], source: str
) -> PreTrainedModel:
    """Build the model without memory, and raise UserError where its sizes are not those of the weights."""
    config_values = config.to_diff_dict()
    try:
        model = _built_on_meta(cls, config)
    except UserError:
        raise
    except Exception as error:
        key = _culprit(cls, config, config_values)
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source}: no {cls.__name__} can be built of its {CONFIG}: {key}{type(error).__name__}: {said}"
        ) from error
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    count, had = sum(t.numel() for t in ours.values()), sum(s.count for s in stored.values())
    if count > 2 * had + MOST_BEYOND_WEIGHTS:
        name, tensor = max(ours.items(), key=lambda item: item[1].numel())
        keys = [k for k, v in config_values.items() if v == max(tensor.shape)]
        raise UserError(
            f"{source}: {CONFIG} describes a model of {count:,} numbers, and its weights are {had:,}. Its largest is "
            f"{name} {tuple(tensor.shape)}" + (f", for {' and '.join(keys)}" if keys else "")
        )
    return model


def _built_on_meta(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return cls(type(config).from_dict(config.to_dict()))


def _culprit(cls: type[PreTrainedModel], config: PretrainedConfig, changed: Mapping[str, Any]) -> str:
    """The key without whose value a model could be built, for the message; nothing where it is not one alone."""
    usual = type(config)().to_dict()
    for key in changed:
        if key in usual and key not in ("model_type", "layer_map"):
            try:
                _built_on_meta(cls, type(config).from_dict({**config.to_dict(), key: usual[key]}))
            except Exception:
                continue
            return f"{key}: {_shown(changed[key])}: "
    return ""


def check_kinds(stored: Mapping[str, Stored], whole: set[str], source: str) -> None:
    """Raise UserError for weights that are no floating numbers; those called ``whole`` may be other than that."""
    wrong = [f"{name} ({s.dtype})" for name, s in stored.items() if s.dtype not in FLOATING and name not in whole]
    if wrong:
        raise UserError(
            f"the weights in {source!r}: expected floating numbers, got {some_of(wrong, separator=', ')}. Quantised "
            "weights cannot be converted: give the model as it was before"
        )


@torch.no_grad()
def check_values(model: nn.Module, source: str) -> None:
    """Raise UserError where a weight is NaN or infinite."""
    wrong = []
    for name, p in model.state_dict(keep_vars=True).items():
        if p.is_floating_point() and p.numel() and not p.is_meta:
            values = p if p.dtype.itemsize > 1 else p.float()
            low, high = torch.aminmax(values)
            wrong += [name] if not (torch.isfinite(low) and torch.isfinite(high)) else []
    if wrong:
        raise UserError(
            f"the weights in {source!r}: expected finite numbers, got NaN or infinity in "
            f"{some_of(wrong, separator=', ')}. Take an earlier checkpoint, or a larger dtype"
        )


# --- the processor ----------------------------------------------------------------------------------------------------


def check_processor(source: str) -> None:
    """Raise UserError, which names file and key, where a processor's files hold what no processor can work with."""
    for name in PROCESSOR_FILES:
        path = find_file(source, name)
        if path is None:
            continue
        values = read_json(path)
        for key, value in {**values, **_inner(values)}.items():
            kind, expected, fits = PROCESSOR_KEYS.get(key, (object, "", lambda v: True))
            wrong_kind = not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, (int, float)))
            if name != "vocab.json" and value is not None and (wrong_kind or not fits(value)):
                raise UserError(f"{path}: {key}: expected {expected}, got {_shown(value)}")
        if name in ("vocab.json", "added_tokens.json"):
            _check_vocabulary(values, path)


def _inner(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A processor's own file holds its feature extractor's."""
    inner = values.get("feature_extractor")
    return inner if isinstance(inner, dict) else {}


def _check_vocabulary(values: Mapping[str, Any], path: Path) -> None:
    for language, tokens in values.items():
        for token, number in (tokens if isinstance(tokens, dict) else {language: tokens}).items():
            if type(number) is not int or not 0 <= number < MOST_LABELS:
                raise UserError(f"{path}: {_shown(token)}: expected a token's number, got {_shown(number)}")
