"""Miniatures of the recipes' corpora, and how each is prepared: by the recipe's name, from data into a folder."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import soundfile
import torch

from cald_speech.data.audio import write_audio
from cald_speech.recipes.an4 import prepare as an4
from cald_speech.recipes.chapters.prepare import prepare as chapters
from cald_speech.recipes.coffee_orders.prepare import prepare as coffee_orders
from cald_speech.recipes.digits import prepare as digits
from cald_speech.recipes.general.prepare import prepare as general
from cald_speech.recipes.glue.prepare import prepare as glue
from cald_speech.recipes.librispeech.prepare import prepare as librispeech
from cald_speech.recipes.pile.prepare import prepare as pile
from cald_speech.recipes.slurp.prepare import prepare as slurp
from cald_speech.recipes.speechocean762 import prepare as speechocean762
from cald_speech.recipes.tedlium.prepare import prepare as tedlium
from cald_speech.recipes.voxceleb.prepare import prepare as voxceleb
from tests.recipes.test_an4 import write_an4
from tests.recipes.test_chapters import write_librispeech
from tests.recipes.test_general import write_corpora
from tests.recipes.test_slurp import write_slurp
from tests.recipes.test_speechocean762 import write_openslr
from tests.recipes.test_tedlium import write_tedlium
from tests.recipes.test_voxceleb import write_voxceleb
from tests.training.miniature import SPLITS, write_corpus

SPEAKERS = ["george", "theo"]


def write_texts(folder: Path) -> Path:
    """Forty texts in a folder, and the same as reviews in IMDB's layout."""
    for number in range(40):
        text = " ".join(("one", "two", "three")[(number + place) % 3] for place in range(30 + number))
        name = f"{number}_{9 * (number % 2) + 1}.txt"
        for path in (
            folder / "texts" / name,
            folder / "aclImdb" / ("train", "test")[number % 4 > 1] / ("neg", "pos")[number % 2] / name,
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text} n{number}\n")
    return folder


def write_orders(folder: Path) -> Path:
    labels = {f"{n}.flac": {"slots": {"coffeeDrink": ("latte", "mocha")[n % 2]}} for n in range(12)}
    for name in labels:
        write_audio(folder / "flac" / name, torch.zeros(800))
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def write_digits(folder: Path) -> Path:
    (folder / "recordings").mkdir(parents=True)
    for digit in range(10):
        for speaker in SPEAKERS:
            for index in range(50):
                path = folder / "recordings" / f"{digit}_{speaker}_{index}.wav"
                soundfile.write(path, torch.full((240,), (digit + 1) / 20).numpy(), 8_000)
    return folder


def prepare_digits(data_folder: Path, output_folder: Path) -> None:
    """With test strings of the miniature's speakers in the place of the committed ones."""
    strings = digits.draw_strings("test", 5, SPEAKERS, digits.TEST_INDICES, 0)
    with mock.patch.object(digits, "_fixed_test_strings", lambda: strings):
        digits.prepare(data_folder, output_folder, num_train=6, num_valid=4)


def prepare_an4(data_folder: Path, output_folder: Path) -> None:
    with mock.patch.object(an4, "OFFICIAL_COUNTS", {"train": 30, "test": 4}):
        an4.prepare(data_folder, output_folder)


def prepare_speechocean762(data_folder: Path, output_folder: Path) -> None:
    with mock.patch.object(speechocean762, "OFFICIAL_COUNTS", {"train": 49, "test": 14}):
        speechocean762.prepare(data_folder, output_folder)


def preparations(place: Path) -> dict[str, Callable[[Path], object]]:
    """Each as a function of the folder that it writes to; the corpora are written below ``place``, once."""
    texts = write_texts(place / "reviews")
    tokens = {"vocab_size": 300, "block_tokens": 48, "held_out_share": 0.15}
    of = {
        "librispeech": partial(librispeech, write_corpus(place / "librispeech"), splits=SPLITS),
        "tedlium": partial(tedlium, write_tedlium(place / "tedlium")),
        "slurp": partial(slurp, write_slurp(place / "slurp")),
        "voxceleb": partial(voxceleb, write_voxceleb(place / "voxceleb")),
        "general": partial(general, write_corpora(place / "general")),
        "an4": partial(prepare_an4, write_an4(place / "an4")),
        "chapters": partial(chapters, write_librispeech(place / "chapters")),
        "speechocean762": partial(prepare_speechocean762, write_openslr(place / "speechocean762")),
        "coffee_orders": partial(coffee_orders, write_orders(place / "orders")),
        "digits": partial(prepare_digits, write_digits(place / "digits")),
        "glue": partial(glue, texts, task="imdb"),
        "pile": partial(pile, texts / "texts", **tokens),
    }
    return of
