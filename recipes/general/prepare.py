"""The training parts of three corpora of read speech to one set of manifests, in one character set.

<data_folder>/{an4,librispeech_mini,speechocean762}/manifest.tsv has a line for each utterance: id, speaker, seconds,
text and, but for librispeech_mini, the official split; the audio is in a folder beside it, <id>.flac or <id>.ogg.

No official test utterance is read. Of the training speakers some are named, for good: those of the dev sets, and
four whose chapters are kept for long-form tests. Nothing is trained on them.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cald_speech.data.manifests import durations_s, prepare_once, read_manifest, refuse, total_duration_s
from cald_speech.data.readers.tables import rows_of
from cald_speech.errors import UserError, some_of
from cald_speech.recipes.an4.prepare import DEV_SPEAKERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Where a corpus keeps its audio, and the speakers that nothing is trained on."""

    audio: str  # folder/*.ending
    dev: tuple[str, ...]
    long_form: tuple[str, ...] = ()
    train_split: str | None = "train"  # the value in the column "split"; None: there is no such column


CORPORA = {
    "an4": Corpus("flac/{}.flac", dev=DEV_SPEAKERS),
    "librispeech_mini": Corpus(
        "ogg/{}.ogg", dev=("669", "7312"), long_form=("2416", "6848", "7367", "7859"), train_split=None
    ),
    "speechocean762": Corpus("ogg/{}.ogg", dev=("0036", "0482", "1042", "3046", "6048")),
}
LONG_FORM = "long-form"
_STRANGE = re.compile(r"[^A-Z' ]")
_WAY_OUT = (
    "recipes/general/README.md says where the three corpora come from; pass the folder they lie in as --data_folder."
)


def prepare(
    data_folder: Path, output_folder: Path, *, corpora: Sequence[str] = tuple(CORPORA), max_s: float | None = None
) -> dict[str, Path]:
    """Write output_folder/manifests/<name>.json; return {name: path}, and log the hours of each.

    The names: "train" (of these `corpora`, and with `max_s` of utterances no longer than so many seconds),
    "dev-<corpus>", "valid" (the dev sets of `corpora` together, which choose the best model) and "long-form" (whole
    chapters, to be joined in the order of the ids).

    Raises: UserError, naming what is missing or cannot be used, and where two sets share a speaker or an utterance.
    """
    unknown = set(corpora) - CORPORA.keys()
    if unknown or not corpora:
        raise UserError(f"corpora: expected some of {', '.join(CORPORA)}, got {', '.join(unknown) or 'none'}")
    data_folder = Path(data_folder).absolute()
    rows = {name: _training_rows(data_folder / name, corpus) for name, corpus in CORPORA.items()}
    sets = _divide(rows)
    longest = math.inf if max_s is None else max_s
    sets["train"] = {
        key: row
        for key, row in sets["train"].items()
        if key.split("/")[0] in corpora and float(row["seconds"]) <= longest
    }
    check_disjoint(sets)
    sets["valid"] = {
        key: row for name, of_set in sets.items() if name.startswith("dev-") for key, row in of_set.items()
    }
    manifests = {name: Path(output_folder) / "manifests" / f"{name}.json" for name in sets}
    for name, path in manifests.items():
        sources = [Path(row["audio"]) for row in sets[name].values()]
        tables = [data_folder / corpus / "manifest.tsv" for corpus in CORPORA]
        prepare_once(path, [*tables, *sources], partial(_entries, name, sets[name]), utterances=sorted(sets[name]))
        speakers = len({entry["speaker"] for entry in read_manifest(path).values()})
        hours = total_duration_s(path) / 3600
        logger.info("%s: %.2f h, %d utterances, %d speakers", name, hours, len(sources), speakers)
    return manifests


def check_disjoint(sets: Mapping[str, Mapping[str, Mapping[str, str]]]) -> None:
    """Raise UserError where two of the ``sets``, {name: {utterance: {"speaker": ...}}}, share utterance or speaker."""
    names = list(sets)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            shared = sets[one].keys() & sets[other].keys()
            shared |= {r["speaker"] for r in sets[one].values()} & {r["speaker"] for r in sets[other].values()}
            if shared:
                raise UserError(
                    f"expected {one} and {other} to share neither utterances nor speakers, but both have "
                    f"{some_of(sorted(shared))}. Restore the corpora's manifest.tsv, or correct CORPORA in {__file__}."
                )


def _training_rows(folder: Path, corpus: Corpus) -> list[dict[str, str]]:
    """The lines of a corpus's table that belong to its training part, the named speakers among them."""
    table = folder / "manifest.tsv"
    if not table.is_file():
        raise UserError(f"expected the table {table}, but it is not there. {_WAY_OUT}")
    rows = [row for _, row in rows_of(table)]
    columns = {"id", "speaker", "seconds", "text"} | ({"split"} if corpus.train_split else set())
    missing = columns - (rows[0].keys() if rows else set())
    if missing:
        raise UserError(f"{table}: expected the columns {', '.join(sorted(columns))}; without {', '.join(missing)}.")
    rows = [row for row in rows if corpus.train_split in (None, row.get("split"))]
    strangers = sorted({*corpus.dev, *corpus.long_form} - {row["speaker"] for row in rows})
    refuse(table.parent.name, "the named speakers", "without a training utterance", strangers, _WAY_OUT)
    for row in rows:
        row["audio"] = str(folder / corpus.audio.format(row["id"]))
    return rows


def _divide(rows: Mapping[str, list[dict[str, str]]]) -> dict[str, dict[str, dict[str, str]]]:
    """Every row into the set of its speaker. Ids and speakers get their corpus's name in front: two may say "0003"."""
    sets: dict[str, dict] = {"train": {}} | {f"dev-{name}": {} for name in CORPORA} | {LONG_FORM: {}}
    for name, of_corpus in rows.items():
        corpus = CORPORA[name]
        for row in of_corpus:
            held_out = LONG_FORM if row["speaker"] in corpus.long_form else "train"
            which = f"dev-{name}" if row["speaker"] in corpus.dev else held_out
            key = f"{name}/{row['id']}"
            refuse(name, "an id for each utterance", "used twice", [key] if key in sets[which] else [], _WAY_OUT)
            sets[which][key] = row | {"speaker": f"{name}/{row['speaker']}"}
    return sets


def _entries(name: str, rows: Mapping[str, Mapping[str, str]]) -> dict[str, dict]:
    texts = {key: " ".join(row["text"].upper().split()) for key, row in rows.items()}
    strange = [f"{key} ({text})" for key, text in texts.items() if not text or _STRANGE.search(text)]
    refuse(name, "transcripts of letters, apostrophes and spaces", "others", strange, "Mend them in manifest.tsv.")
    durations, faults = durations_s(Path(row["audio"]) for row in rows.values())
    refuse(name, "readable audio for each line of manifest.tsv", "files that cannot be used", faults, _WAY_OUT)
    return {
        key: {
            "audio": row["audio"],
            "duration_s": durations[Path(row["audio"])],
            "text": texts[key],
            "speaker": row["speaker"],
        }
        for key, row in rows.items()
    }
