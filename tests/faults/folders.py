"""Damaged model folders: config, layer map, processor, cald.json and weights of wrong kinds, sizes and values."""

import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, WhisperConfig
from transformers.utils import logging

import cald_speech
from cald_speech import LayerMap, convert
from cald_speech.conversion.model_card import read_facts, update_facts
from cald_speech.data.text import make_processor
from cald_speech.families import families
from cald_speech.families.hub import load_processor
from cald_speech.longform import transcribe
from cald_speech.mixers import (
    Bidirectional,
    GatedDeltaNet,
    Hydra,
    Linformer,
    Mamba,
    Mamba2,
    NormalisedLinearAttention,
    WindowedAttention,
)
from cald_speech.tasks.processors import feature_extractor
from tests.families.test_features import BERT, PARAKEET, write_teacher
from tests.families.test_whisper import EXTRACTOR
from tests.families.test_whisper import SMALL as WHISPER
from tests.helpers import tiny_model

VALUES: list[Any] = [None, True, False, 0, 1, -1, 7, -1000, 10**6, 2**31, 2**40, 10**30, 1e30, -1e-30, 0.5]
VALUES += [math.nan, math.inf, -math.inf, "", "x", "\x00", "../../etc/passwd", "é" * 1000, [], {}, [1], {"a": 1}]
VALUES += [[[]] * 3, list(range(5000)), {"mixer": "Mamba2", "arguments": {}}, {"mixer": "Mixer", "arguments": {}}]
DTYPES = [torch.int64, torch.int8, torch.bool, torch.uint8, torch.complex64, torch.float64, torch.float16]
DTYPES += [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
NEW_KEYS = ["quantization_config", "auto_map", "mixer", "attn_implementation", "d_model", "transformers_weights", "x"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 40}
SPEECH = {
    "plain": LayerMap(),
    "mamba2": LayerMap(partial(Bidirectional, share_projections=True)),
    "mixed": LayerMap(partial(Linformer, k=4, max_length=64), {0: partial(Bidirectional, mixer=Mamba)}),
    "hybrid": LayerMap(partial(Hydra), {1: partial(WindowedAttention, window=4)}),
    "linear": LayerMap(NormalisedLinearAttention, {1: partial(Bidirectional, mixer=GatedDeltaNet)}),
}
# Of families whose folders have other files and other sizes: they hear features, or squeeze frames.
OTHERS = ("sew", "wav2vec2-bert", "parakeet", "whisper")


@cache
def sound() -> dict[str, Path]:
    """Whole folders by their names, made once for this process."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    place = Path(tempfile.mkdtemp(prefix="sound-"))
    for name, layer_map in SPEECH.items():
        torch.manual_seed(0)
        processor = make_processor(place / "new", ["abc"])
        model = tiny_model(families()["wav2vec2"], vocab_size=len(processor.tokenizer))
        convert(model, layer_map)
        model.save_pretrained(place / name)
        processor.save_pretrained(place / name)
        row = {"wer": 1.0, "wer_interval": [0.5, 1.5], "longest_audio_s": 3.0, "words": 10, "decoder": "greedy"}
        update_facts(place / name, teacher="a/b", steps=3, results={"dev": {**row, "manifest_hash": "0" * 64}})
    for name in ("wav2vec2-bert", "parakeet"):
        family = BERT if name == "wav2vec2-bert" else PARAKEET
        write_teacher(family, place / "new" / name)
        model = cald_speech.from_pretrained(place / "new" / name)
        convert(model, LayerMap(Bidirectional, {0: None}))
        model.save_pretrained(place / name)
        load_processor(place / "new" / name).save_pretrained(place / name)
    processor = make_processor(place / "new", ["abc"])
    for name, model in {
        "sew": tiny_model(families()["sew"], vocab_size=len(processor.tokenizer)),
        "whisper": families()["whisper"].load(WhisperConfig(**WHISPER)),
    }.items():
        convert(model, LayerMap(Bidirectional, {0: None}))
        model.save_pretrained(place / name)
        (EXTRACTOR if name == "whisper" else processor).save_pretrained(place / name)
    for name, config in {"bert": BertConfig(**SIZES), "llama": LlamaConfig(**SIZES)}.items():
        family = families()[name]
        model = family.load(config)
        convert(model, LayerMap(Mamba2 if family.causal else Bidirectional, {1: None}))
        model.save_pretrained(place / name)
    return {path.name: path for path in place.iterdir() if path.name != "new"}


def damaged_folder(rng: random.Random, folder: Path) -> None:
    """One sound folder with one to three things wrong, loaded and run as the commands do."""
    name = rng.choice(sorted(sound()))
    target = folder / "model"
    shutil.copytree(sound()[name], target)
    for _ in range(rng.choice([1, 1, 2, 3])):
        rng.choice(DAMAGES)(rng, target)
    use(target, name)


@torch.no_grad()
def use(folder: Path, name: str) -> None:
    """What becomes of a folder: loaded, run on something short, its facts read and written."""
    if name == "whisper":
        model, extractor = (
            cald_speech.from_pretrained(folder, head="classification"),
            feature_extractor([str(folder)], str(folder)),
        )
        heard = extractor([torch.zeros(4000).numpy()], sampling_rate=16_000, return_tensors="pt")
        model(heard.input_features)
        return
    if name not in (*SPEECH, *OTHERS):
        model = cald_speech.from_pretrained(folder, head="base")
        model(torch.tensor([[5, 6, 7]]))
        return
    facts = read_facts(folder)
    model, processor = cald_speech.from_pretrained(folder), load_processor(folder)
    for _ in transcribe(model, torch.zeros(4000), processor=processor, force=True):
        pass
    if facts:
        update_facts(folder, steps=1)


# --- what is done to a folder -----------------------------------------------------------------------------------------


def change_json(rng: random.Random, folder: Path) -> None:
    """One value of one of the JSON files; config.json as often as all others together."""
    files = sorted(folder.glob("*.json"))
    path = rng.choice([folder / "config.json", rng.choice([folder / "config.json", *files])])
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(values, dict) or not values:
        return
    node, key = place_in(values, rng)
    kind = rng.random()
    if kind < 0.1:
        del node[key]
    elif kind < 0.2 and isinstance(node, dict):
        node[rng.choice(["quantization_config", "auto_map", "mixer", "attn_implementation", "d_model", "x"])] = (
            rng.choice(VALUES)
        )
    elif kind < 0.3 and isinstance(node[key], int):
        node[key] = node[key] * rng.choice([2, 3, 100, -1, 10**6])
    else:
        node[key] = rng.choice(VALUES)
    text = json.dumps(values)
    if kind > 0.97:
        text = text.replace(json.dumps(node[key]), "[" * 3000 + "]" * 3000, 1)
    path.write_text(text)


def place_in(values: dict, rng: random.Random) -> tuple[Any, Any]:
    """A random container in it, and a key there."""
    node: Any = values
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
            return node, key
        node = node[key]


def damage_bytes(rng: random.Random, folder: Path) -> None:
    """A file that is cut, changed in places, empty, gone, a folder, in another encoding, or another altogether."""
    path = rng.choice(
        sorted(p for p in folder.iterdir() if p.is_file() and p.name != "README.md") or [folder / "config.json"]
    )
    data = path.read_bytes() if path.is_file() else b""
    kind = rng.randrange(8)
    if kind == 0:
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif kind == 1:
        changed = bytearray(data)
        for _ in range(min(len(data), rng.randrange(1, 20))):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(changed)
    elif kind == 2:
        path.write_bytes(b"")
    elif kind == 3:
        path.unlink(missing_ok=True)
    elif kind == 4:
        path.unlink(missing_ok=True)
        path.mkdir()
    elif kind == 5:
        path.write_bytes(rng.choice([b"[]", b"null", b"3", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf" + data]))
    elif kind == 6:
        path.write_bytes(rng.randbytes(rng.randrange(1, 300)))
    else:
        path.write_bytes(data + rng.randbytes(rng.randrange(1, 300)))


def damage_weights(rng: random.Random, folder: Path) -> None:
    """A tensor of another dtype, shape or value, one missing or one more; a header that lies; a pickle instead."""
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except Exception:
        return
    if not weights:  # the damage before has left none
        return
    name, kind = rng.choice(sorted(weights)), rng.randrange(8)
    w = weights[name]
    if kind == 0:
        weights[name] = w.to(rng.choice(DTYPES))
    elif kind == 1:
        dtype = rng.choice(DTYPES)
        weights = {key: v.to(dtype) for key, v in weights.items()}
    elif kind == 2 and w.numel():
        w.view(-1)[rng.randrange(w.numel())] = rng.choice([math.nan, math.inf, -math.inf, 1e38])
    elif kind == 3:
        weights[name] = rng.choice([w.flatten(), w[None], w[:1], torch.zeros(0), torch.zeros(3, 1)]).clone()
    elif kind == 4:
        del weights[name]
    elif kind == 5:
        weights[name + rng.choice([".mixer", "x", ".weight"])] = torch.ones(2)
    elif kind == 6:
        torch.save(weights, folder / "pytorch_model.bin")
        path.unlink()
        return
    elif kind == 7:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + size].replace(b"F32", rng.choice([b"F64", b"I32", b"XXX"]), 1)
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        return
    save_file(weights, path, metadata={"format": "pt"})


DAMAGES: list[Callable[[random.Random, Path], None]] = [change_json, change_json, change_json, damage_bytes]
DAMAGES += [damage_weights]
GENERATORS = {"model folders": damaged_folder}
