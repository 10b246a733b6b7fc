"""Damaged corpora: manifests, tables, transcripts and archives of every format, with bytes and values changed."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from cald_speech.data.manifests import read_manifest
from cald_speech.data.readers import prepare_corpus
from cald_speech.data.tables import read_table
from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.recipes.tedlium.stm import read_stm
from tests.data.corpora import COLUMNS, FORMATS, miniature, write

AUDIO = {".wav", ".flac"}
BYTES = [
    b"\x00",
    b"\xff",
    b"\xfe\xff",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xe9",
    b"\r",
    b"\n",
    b"\n\n",
    b'"',
    b"'",
    b",",
    b"\t",
]
BYTES += [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"\\",
    b"\\ud800",
    b"|",
    b"/",
    b"../",
    b"://",
    b"-1",
    b"nan",
    b"1e999",
    b"9" * 5000,
]
BYTES += [b"[" * 3000, b"x" * 5000, "İé中\u2028\u202e".encode(), "x".encode("utf-16")]
VALUES = [
    None,
    True,
    0,
    -1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
    "x" * 5000,
    [],
    {},
    [[]],
]
VALUES += [{"file": "x", "start": -1, "stop": "x"}, {"bytes": "x"}, "/etc/passwd", "..", "a|", "http://x"]


@cache
def sound() -> dict[str, Path]:
    """Whole corpora by the names of their formats, made once for this process."""
    place = Path(tempfile.mkdtemp(prefix="corpora-"))
    found = {name: write(name, place / str(number) / "data", miniature()) for number, name in enumerate(FORMATS)}
    for name, file, lines in (
        ("STM", "a.stm", ["talk 1 speaker 0.5 1.25 <o,f0,male> it 's on", ";; so", "talk 1 speaker 2 3 <o> off"]),
        ("rows", "a.jsonl", [json.dumps({"text": t, "pair": None, "label": "yes"}) for t in ("one", "two")]),
    ):
        found[name] = place / name / "data" / file
        found[name].parent.mkdir(parents=True)
        found[name].write_text("\n".join([*lines, ""]))
    return found


def use(name: str, source: Path, out: Path) -> None:
    if name == "STM":
        read_stm(source)
    elif name == "rows":
        read_table(source)
    else:
        if name == "LibriSpeech":
            prepare(source.parent, out / "recipe", {"test": [source.name]})
        prepare_corpus(out / "a.json", source, columns=COLUMNS.get(name))
        for _ in range(2):
            read_manifest(out / "a.json")
        if name == "our JSON":
            read_manifest(source)


def damaged(name: str, rng: random.Random, folder: Path) -> None:
    """One to four changes in one of the corpus's files, and what becomes of the corpus."""
    source = sound()[name]
    top = next(path for path in (source, *source.parents) if path.name == "data")
    shutil.copytree(top, folder / "data")
    files = sorted(path for path in (folder / "data").rglob("*") if path.is_file() and path.suffix not in AUDIO)
    path = rng.choice(files)
    content = path.read_bytes()
    for _ in range(rng.choice([1, 1, 2, 4])):
        content = change(content, rng)
    path.write_bytes(content)
    if rng.random() < 0.03:
        path.unlink()
    use(name, folder / "data" / source.relative_to(top), folder / "out")


def change(content: bytes, rng: random.Random) -> bytes:
    at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kinds: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[:at] + content[end:],
        lambda: content[:at] + rng.choice(BYTES) + content[at:],
        lambda: content[:at] + rng.choice(BYTES) + content[at + 1 :],
        lambda: content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        lambda: content[:end] + content[at:],
        lambda: lines(content, rng),
        lambda: values(content, rng),
        lambda: values(content, rng),
        lambda: content.decode("utf-8", "replace").encode(
            rng.choice(["latin-1", "utf-16", "utf-16-le", "utf-32"]), "replace"
        ),
    ]
    return rng.choice(kinds)()


def lines(content: bytes, rng: random.Random) -> bytes:
    """A line twice, gone, or elsewhere."""
    parts = content.split(b"\n")
    part = parts.pop(rng.randrange(len(parts)))
    for _ in range(rng.choice([0, 1, 2])):
        parts.insert(rng.randrange(len(parts) + 1), part)
    return b"\n".join(parts)


def values(content: bytes, rng: random.Random) -> bytes:
    """A value of a JSON file, or of one of its lines, of another kind; of other files a word."""
    try:
        whole = [json.loads(content)]
    except (ValueError, RecursionError):
        try:
            whole = [json.loads(line) for line in content.splitlines()]
        except (ValueError, RecursionError):
            words = content.split(b" ")
            words[rng.randrange(len(words))] = rng.choice(BYTES)
            return b" ".join(words)
    places = [at for row in whole for at in inside(row)]
    if places:
        holder, key = rng.choice(places)
        if isinstance(holder, dict) and rng.random() < 0.2:
            holder[rng.choice(["text", "audio", "start", "stop", "duration", "id", "x"])] = holder.pop(key)
        else:
            holder[key] = rng.choice(VALUES)
    return "\n".join(
        json.dumps(row, indent=rng.choice([None, 1]) if len(whole) == 1 else None) for row in whole
    ).encode()


def inside(value: object) -> list[tuple]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at for key, inner in pairs for at in [(value, key), *inside(inner)]]


def one_of(names: Sequence[str], rng: random.Random, folder: Path) -> None:
    damaged(rng.choice(names), rng, folder)


GENERATORS = {
    "tables of a corpus": partial(one_of, ["CSV", "TSV", "SpeechBrain CSV", "table without names"]),
    "JSON of a corpus": partial(
        one_of, ["our JSON", "SpeechBrain JSON", "NeMo", "NeMo .json", "JSON list", "lhotse cuts"]
    ),
    "folders of a corpus": partial(one_of, ["Kaldi", "LibriSpeech", "text beside", "audiofolder"]),
    "archives of a corpus": partial(one_of, ["parquet", "WebDataset", "NeMo tarred", "lhotse shards"]),
    "transcripts and rows": partial(one_of, ["STM", "rows"]),
}
