"""The four corpora of prepare.py: where they are, what their files look like, and reading them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cald_speech.data.encodings import read_text
from cald_speech.errors import UserError

HUB = "hub"  # the data_folder that stands for a corpus's copy on the hub
_GLUE = "The archives are at https://gluebenchmark.com/tasks: unpack them into one folder and pass it as --data_folder."
# In an older QQP.zip some lines are broken in two.
_QQP = f"{_GLUE} Of QQP take https://dl.fbaipublicfiles.com/glue/data/QQP-clean.zip, whose lines are whole."
_IMDB = (
    "The archive is at https://ai.stanford.edu/~amaas/data/sentiment: unpack it and pass its folder as --data_folder."
)
Rows = list[dict[str, str | None]]


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is and what it looks like."""

    hub: tuple[str, ...]  # the arguments of load_dataset
    folder: str
    counts: dict[str, int]  # official number of rows by the file's name
    labels: dict[str, str]  # files' names for them -> models' names, in the order of the hub's numbers
    texts: tuple[str, ...]  # columns
    columns: tuple[str, ...] = ()  # of a .tsv file, the last being the label; none for a file for each text
    way_out: str = _GLUE


CORPORA = {
    "qnli": Corpus(
        hub=("nyu-mll/glue", "qnli"),
        folder="QNLI",
        counts={"train": 104_743, "dev": 5_463},
        labels={name: name for name in ("entailment", "not_entailment")},
        texts=("question", "sentence"),
        columns=("index", "question", "sentence", "label"),
    ),
    "qqp": Corpus(
        hub=("nyu-mll/glue", "qqp"),
        folder="QQP",
        counts={"train": 363_846, "dev": 40_430},
        labels={"0": "not_duplicate", "1": "duplicate"},
        texts=("question1", "question2"),
        columns=("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
        way_out=_QQP,
    ),
    "sst2": Corpus(
        hub=("nyu-mll/glue", "sst2"),
        folder="SST-2",
        counts={"train": 67_349, "dev": 872},
        labels={"0": "negative", "1": "positive"},
        texts=("sentence",),
        columns=("sentence", "label"),
    ),
    "imdb": Corpus(
        hub=("stanfordnlp/imdb",),
        folder="aclImdb",
        counts={"train": 25_000, "test": 25_000},
        labels={"neg": "negative", "pos": "positive"},
        texts=("text",),
        way_out=_IMDB,
    ),
}


def files_of(corpus: Corpus, data_folder: Path, name: str) -> list[Path]:
    """The files of one set, sorted. Raises UserError where they are not there."""
    folder = data_folder / corpus.folder
    if corpus.columns:
        wanted, found = folder / f"{name}.tsv", sorted(folder.glob(f"{name}.tsv"))
    else:
        wanted = (folder if folder.is_dir() else data_folder) / name
        of_each = [sorted((wanted / label).glob("*.txt")) for label in corpus.labels]
        found = [path for of_one in of_each for path in of_one] if all(of_each) else []
    if not found:
        what = "" if corpus.columns else f"/{{{','.join(corpus.labels)}}}/*.txt"
        raise UserError(f"expected {wanted}{what}; it is not there. {corpus.way_out} --data_folder {HUB} downloads it")
    return found


def from_files(corpus: Corpus, paths: list[Path]) -> Rows:
    """The rows of one set's files. Raises UserError, naming file and line, for what is none."""
    if corpus.columns:
        return list(_lines(corpus, paths[0]))
    return [_row(corpus, [read_text(path)], corpus.labels[path.parent.name]) for path in paths]


def _lines(corpus: Corpus, path: Path) -> Iterator[dict[str, str | None]]:
    """The rows of a .tsv file, in which a quote is a character as any other."""
    # What else Python takes for the end of a line may stand in a text.
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        cells = tuple(line.split("\t"))
        if number == 1:
            if cells != corpus.columns:
                raise UserError(
                    f"{path}: expected the columns {', '.join(corpus.columns)}, got {', '.join(cells)[:200]}"
                )
        elif len(cells) != len(corpus.columns) or cells[-1] not in corpus.labels:
            raise UserError(
                f"{path}, line {number}: expected {len(corpus.columns)} columns, the last one of "
                f"{', '.join(corpus.labels)}, got {len(cells)}: {line[:80]!r}. {corpus.way_out}"
            )
        else:
            row = dict(zip(corpus.columns, cells, strict=True))
            yield _row(corpus, [row[column] for column in corpus.texts], corpus.labels[cells[-1]])


def from_hub(corpus: Corpus) -> dict[str, Rows]:
    """The rows of every set. Raises UserError where `datasets` or the hub cannot be had."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            "data_folder: the hub's copies are read with `datasets`, which is not installed: pip install "
            f"'cald-speech[text]', or give a folder. {corpus.way_out}"
        ) from None
    try:
        loaded = load_dataset(*corpus.hub)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {'/'.join(corpus.hub)} from the hub: {error}. {corpus.way_out}") from error
    labels, kept = list(corpus.labels.values()), {}
    for name in corpus.counts:
        rows = loaded["validation" if name == "dev" else name]
        kept[name] = [_row(corpus, [row[column] for column in corpus.texts], labels[row["label"]]) for row in rows]
    return kept


def _row(corpus: Corpus, texts: list[str], label: str) -> dict[str, str | None]:
    return {"text": texts[0], "pair": texts[1] if len(texts) > 1 else None, "label": label}
