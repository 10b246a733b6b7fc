"""QNLI, QQP and SST-2 (GLUE) and IMDB to tables of text, from the hub or from a folder in the corpora's own layouts.

<data_folder>/QNLI/{train,dev}.tsv, and the same in QQP and SST-2     the archives of gluebenchmark.com, unpacked
<data_folder>[/aclImdb]/{train,test}/{neg,pos}/*.txt                  aclImdb_v1.tar.gz, unpacked
"""

import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from cald_speech.data.tables import write_tables_once
from cald_speech.errors import UserError
from cald_speech.recipes.glue.corpora import CORPORA, HUB, Corpus, Rows, files_of, from_files, from_hub

logger = logging.getLogger(__name__)


def prepare(
    data_folder: Path, output_folder: Path, *, task: str, held_out_share: float = 0.1, seed: int = 0
) -> dict[str, Path]:
    """Write output_folder/manifests/<task>-<set>.jsonl, unless nothing changed, and return {set: that path}.

    GLUE's test labels are secret: ``train`` and ``valid``, its dev set, are all there is. IMDB has ``test``, and of its
    training reviews ``held_out_share``, chosen by ``seed`` and a hash of their text, are ``valid``; with 0 the test set
    is, as in the paper's published code.

    Arguments
    ---------
    data_folder : a folder, or ``hub`` (needs `datasets`: pip install 'cald-speech[text]').
    task : qnli, qqp, sst2 or imdb.

    Raises: UserError, for another task, naming what is missing, and with file and line for one that is malformed.
    """
    if task not in CORPORA:
        raise UserError(f"task: expected one of {', '.join(CORPORA)}, got {task!r}. Choose one with --glue_task")
    if not 0 <= held_out_share < 1:
        raise UserError(f"held_out_share: expected a share from 0 to less than 1, got {held_out_share}")
    corpus, data_folder = CORPORA[task], Path(data_folder)
    download = str(data_folder) == HUB and not data_folder.is_dir()
    files = {} if download else {name: files_of(corpus, data_folder, name) for name in corpus.counts}
    names = ("train", "valid", "test") if "test" in corpus.counts else ("train", "valid")
    tables = {name: Path(output_folder) / "manifests" / f"{task}-{name}.jsonl" for name in names}
    settings = {"task": task, "held_out_share": held_out_share, "seed": seed}
    make = partial(_sets, corpus, files, held_out_share, seed)
    write_tables_once(tables, [path for of_one in files.values() for path in of_one], make, **settings)
    return tables


def _sets(corpus: Corpus, files: Mapping[str, list[Path]], share: float, seed: int) -> dict[str, Rows]:
    """A held-out review is chosen by its text alone: one that is there twice is never on both sides."""
    read = {name: from_files(corpus, paths) for name, paths in files.items()} if files else from_hub(corpus)
    for name, expected in corpus.counts.items():
        if len(read[name]) != expected:
            found = (corpus.folder, name, f"{len(read[name]):,}", f"{expected:,}")
            logger.warning("%s %s has %s rows, the official one %s: figures on it do not compare", *found)
    if "dev" in read:
        return {"train": read["train"], "valid": read["dev"]}
    parts: dict[bool, Rows] = {False: [], True: []}
    for row in read["train"]:
        place = int(hashlib.sha256(f"{seed}:{row['text']}".encode()).hexdigest(), 16) % 10_000
        parts[place < share * 10_000].append(row)
    return {"train": parts[False], "valid": parts[True] if share else read["test"], "test": read["test"]}
