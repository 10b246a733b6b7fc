"""Damaged experiments: yamls with other tags, keys, values and bases, cut, nested, and with bombs in them."""

import random
from pathlib import Path

from cald_speech.shipped import hparams_folder
from cald_speech.training.settings import Settings

TAGS = ["!apply:os.system", "!new:subprocess.Popen", "!name:builtins.eval", "!!python/object/apply:os.system"]
TAGS += ["!new:cald_speech.conversion.LayerMap", "!name:cald_speech.mixers.Mamba2", "!new:torch.nn.Linear", "!ref"]
TAGS += ["!apply:cald_speech.training.choices.choose", "!new:transformers.BertConfig", "!include:/x", "!copy", "!x"]
VALUES = ["null", "true", "-1", "0", "1e400", ".nan", ".inf", "x", "[]", "{}", "[1,[2]]", "'", '"', "*b", "<seed>", "%"]
VALUES += ["2020-01-01", "0x1F", "1_000", "é", "@", "(1,2)", "\x00"]
VALUES += ["{a: {b: c}}", "&a [*a]", "!ref <seed>", "!ref <no>", "!ref <output_folder><output_folder>"]
VALUES += ["!ref <seed> ** 9999999", "[" * 2000, "{a: " * 50, "9" * 5000, "\U0001f600"]
BASES = ["damaged.yaml", "./damaged.yaml", "none.yaml", "[]", "/etc/passwd", "../..", "{}", "mamba.yaml"]


def damaged_experiment(rng: random.Random, folder: Path) -> None:
    """A shipped experiment with one to four lines changed, read as a run reads it."""
    source = rng.choice(sorted(p for p in hparams_folder().rglob("*.yaml") if p.parent.name != "guidance"))
    lines = source.read_text().replace("base: ", f"base: {source.parent}/").splitlines()
    for _ in range(rng.choice([1, 1, 2, 4])):
        lines = change(lines, rng)
    text = "\n".join(lines)
    if rng.random() < 0.1:
        text = text[: rng.randrange(len(text) + 1)]
    data = bytearray(text, "utf-8")
    if data and rng.random() < 0.1:
        data[rng.randrange(len(data))] = rng.randrange(256)
    path = folder / "damaged.yaml"
    path.write_bytes(data)
    Settings.load(path)


def change(lines: list[str], rng: random.Random) -> list[str]:
    """The lines with one of them changed, gone, there twice, moved in, or new."""
    if not lines:
        return [f"seed: {rng.choice(VALUES)}"]
    place = rng.randrange(len(lines))
    key, _, value = lines[place].partition(": ")
    kind = rng.randrange(10)
    if kind == 0:
        new = []
    elif kind == 1:
        new = [lines[place]] * 2
    elif kind == 2:
        new = [" " * rng.randrange(8) + lines[place].strip()]
    elif kind == 3:
        new = [lines[place], f"{rng.choice(['base', 'guidance', 'loss', 'task', 'nothing'])}: {rng.choice(VALUES)}"]
    elif kind == 4:
        new = [f"{key}: {rng.choice(TAGS)} {value}"]
    elif kind == 5:
        new = [f"{key}: {rng.choice(TAGS)} {rng.choice(VALUES)}"]
    elif kind == 6:
        new = [lines[place], f"base: {rng.choice(BASES)}"]
    elif kind == 7:
        new = bomb(rng)
    else:
        new = [f"{key}: {rng.choice(VALUES)}"]
    return [*lines[:place], *new, *lines[place + 1 :]]


def bomb(rng: random.Random) -> list[str]:
    """Lines that stand for far more than they are."""
    count = rng.randrange(2, 60)
    reference = rng.random() < 0.5
    first = "a0: x" if reference else "a0: &a0 [x, x]"
    line = "a{0}: !ref <a{1}><a{1}>" if reference else "a{0}: &a{0} [*a{1}, *a{1}]"
    return [first, *(line.format(i, i - 1) for i in range(1, count))]


GENERATORS = {"experiments": damaged_experiment}
