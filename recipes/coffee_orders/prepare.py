"""Spoken drink orders (Picovoice speech-to-intent benchmark) to manifests: the drink is the label, folds are by file.

<data_folder>/data/label/label.json maps file names to {"slots": {"coffeeDrink": ...}}, and data/speech/clean holds the
audio, as in the benchmark's repository; or <data_folder>/labels.json and flac/.
"""

import hashlib
import json
from pathlib import Path

from cald_speech.data.audio import audio_info
from cald_speech.data.encodings import read_text
from cald_speech.data.manifests import write_manifest
from cald_speech.errors import UserError

SLOT = "coffeeDrink"
SLOTS = (SLOT, "size", "numberOfShots", "roast", "milkAmount", "sugarAmount")  # as in slots_teacher.yaml
NONE = "none"
NUM_FOLDS = 5
PLACES = (("labels.json", "flac"), ("data/label/label.json", "data/speech/clean"))  # of labels, and of audio
_WAY_OUT = (
    "The orders are in a repository: git clone --depth 1 https://github.com/Picovoice/speech-to-intent-benchmark, and "
    "pass its folder as --data_folder."
)


def prepare(data_folder: Path, output_folder: Path, *, fold: int = 0, slots: bool = False) -> dict[str, Path]:
    """Write output_folder/manifests/{train,valid,test}-<fold>.json: test is the fold, valid the next, train the rest.

    The text is the drink; with `slots` the values of all `SLOTS`, each one word ("latte twelve_ounce none ..."), and
    the names end in -slots.

    A file's fold is a hash of its name, so that it stays where it is whatever else there is.

    Raises: UserError, where labels.json or a file that it names is missing, or there is no such fold.
    """
    data_folder = Path(data_folder).absolute()
    if not 0 <= fold < NUM_FOLDS:
        raise UserError(f"fold: expected 0 to {NUM_FOLDS - 1}, got {fold}")
    labels_file, audio = _places(data_folder)
    try:
        labels = json.loads(read_text(labels_file, "the labels"))
        orders = {
            name: values_of(entry["slots"]) if slots else str(entry["slots"][SLOT])
            for name, entry in labels.items()
            if SLOT in entry["slots"]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{labels_file}: expected {{file: {{slots: ...}}}} in JSON, but {error!r}. {_WAY_OUT}"
        ) from error
    missing = [name for name in orders if not (audio / name).is_file()]
    if missing:
        raise UserError(
            f"expected {len(orders)} orders in {audio}, but {len(missing)} are missing, the first: "
            f"{missing[0]}. {_WAY_OUT}"
        )
    sets: dict[str, dict] = {"train": {}, "valid": {}, "test": {}}
    for name, text in sorted(orders.items()):
        path = audio / name
        num_samples, rate = audio_info(path)
        offset = (fold_of(name) - fold) % NUM_FOLDS
        which = {0: "test", 1: "valid"}.get(offset, "train")
        sets[which][Path(name).stem] = {"audio": path, "duration_s": num_samples / rate, "text": text}
    ending = f"{fold}-slots" if slots else f"{fold}"
    manifests = {which: Path(output_folder) / "manifests" / f"{which}-{ending}.json" for which in sets}
    for which, path in manifests.items():
        write_manifest(path, sets[which])
    return manifests


def values_of(slots: dict[str, str]) -> str:
    """One word for each of `SLOTS`, in their order.

    Example
    -------
    >>> values_of({"coffeeDrink": "iced coffee", "milkAmount": " skim milk"})
    'iced_coffee none none none skim_milk none'
    """
    return " ".join("_".join(str(slots.get(slot, NONE)).split()) for slot in SLOTS)


def entities_of(text: str) -> list[tuple[str, str]]:
    """The slots that an order fills, (name, value), of such a text.

    Example
    -------
    >>> entities_of("iced_coffee none none none skim_milk none")
    [('coffeeDrink', 'iced coffee'), ('milkAmount', 'skim milk')]
    """
    values = zip(SLOTS, text.split(" "), strict=True)
    return [(slot, value.replace("_", " ")) for slot, value in values if value != NONE]


def _places(data_folder: Path) -> tuple[Path, Path]:
    """The file of the labels and the folder of the audio."""
    for labels, audio in PLACES:
        if (data_folder / labels).is_file():
            return data_folder / labels, data_folder / audio
    wanted = " or ".join(labels for labels, _ in PLACES)
    raise UserError(f"expected the orders' labels in {data_folder}, as {wanted}; they are not there. {_WAY_OUT}")


def fold_of(name: str) -> int:
    """The fold of a file; its format does not matter.

    Example
    -------
    >>> fold_of("05b2d348-4ab5-4ccc-a17e-3ccb3907b272.flac")
    1
    """
    return int(hashlib.sha256(f"{Path(name).stem}.flac".encode()).hexdigest(), 16) % NUM_FOLDS
