"""Long form on real recordings: a student and its teacher on whole chapters, read in every way there is.

    python recipes/chapters/compare.py --teacher recipes/general/teacher --student results/general/student/model

Three tables: each way of reading (WER, what is written, CER against what the teacher wrote), each chapter (whole = long
form, time, memory) and forced alignment of the known text (borders.py). Every reading runs in a process of its own, for
its memory, and is kept in the output folder: stopped and started again, the script goes on. The last line is JSON.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from cald_speech.benchmarks.long_audio import run_case
from cald_speech.commands import options
from cald_speech.conversion import LayerMap, convert, from_pretrained, save_processor
from cald_speech.errors import UserError
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.evaluation.report import format_table, read_result
from cald_speech.families.hub import load_processor
from cald_speech.files import whole_file
from cald_speech.longform.recogniser import Recogniser
from cald_speech.mixers import WindowedAttention
from cald_speech.recipes.chapters.borders import border_errors, border_row
from cald_speech.recipes.chapters.prepare import chapters_of, prepare
from cald_speech.recipes.chapters.tables import ALONE, LONG, TEACHER, WHOLE, chapter_rows, reading_rows, unlikeness

MODEL = partial(click.option, type=options.ModelSource(), show_default=True)


@options.command()
@MODEL("--teacher", default="recipes/general/teacher", help="A folder or hub id.")
@MODEL("--student", default="results/general/student/model", help="The converted teacher.")
@click.option("--data_folder", type=Path, default="data", show_default=True)
@click.option("--output_folder", type=Path, default="results/chapters", show_default=True)
@click.option("--chapter", "only", multiple=True, help="Of these alone; default: all of the held-out speakers.")
@click.option(
    "--window", "windows", type=int, multiple=True, default=(64, 512), show_default=True, help="Frames either side."
)
@click.option("--limit_s", default=7200.0, show_default=True, help="A reading that takes longer is given up.")
def main(
    teacher: str,
    student: str,
    data_folder: Path,
    output_folder: Path,
    only: Sequence[str],
    windows: Sequence[int],
    limit_s: float,
) -> None:
    """Compare TEACHER and STUDENT on whole chapters."""
    manifest = prepare(data_folder, output_folder)["test"]
    chapters = chapters_of(manifest)
    if unknown := sorted(set(only) - chapters.keys()):
        raise UserError(f"--chapter: expected some of {', '.join(chapters)}, got {', '.join(unknown)}")
    chapters = {name: chapters[name] for name in only or chapters}
    narrowed = {frames: windowed(teacher, frames, output_folder) for frames in windows}
    systems = {TEACHER: (teacher, "whole")}
    systems |= {
        f"teacher, window of {frames}, not trained": (folder, "long-form") for frames, folder in narrowed.items()
    }
    systems |= {
        "teacher, chunk and stitch": (teacher, "chunks"),
        WHOLE: (student, "whole"),
        LONG: (student, "long-form"),
    }
    readings = {
        system: {
            name: _read(model, reader, next(iter(of.values()))["audio"], output_folder / "readings", limit_s)
            for name, of in chapters.items()
        }
        for system, (model, reader) in systems.items()
    }
    report = output_folder / "by_utterance"
    evaluate_folder(teacher, manifest, report, split="chapters", progress=False)
    said = {one.id: one.hypothesis for one in read_result(report, "chapters").utterances}
    readings[ALONE] = {name: {"text": " ".join(said[key] for key in of)} for name, of in chapters.items()}
    recognisers = {"student": Recogniser.of(student)}
    recognisers |= {f"teacher, window of {n}": Recogniser.of(str(folder), force=True) for n, folder in narrowed.items()}
    unlike = {name: unlikeness(recognisers["student"], of) for name, of in chapters.items()}
    errors = {
        model: [border_errors(recogniser, of) for of in chapters.values()] for model, recogniser in recognisers.items()
    }
    tables = {
        "readings": reading_rows(readings, chapters),
        "chapters": chapter_rows(readings, chapters, unlike),
        "borders": [
            border_row(model, {key: [e for chapter in of for e in chapter[key]] for key in of[0]})
            for model, of in errors.items()
        ],
    }
    text = "\n\n".join(format_table(rows) for rows in tables.values())
    with whole_file(output_folder / "tables.md") as unfinished:
        unfinished.write_text(text + "\n")
    click.echo(text)
    click.echo(json.dumps(tables))


def windowed(teacher: str, frames: int, output_folder: Path) -> str:
    """A folder with the teacher's own weights, attention cut off after so many frames on either side."""
    folder = output_folder / f"window_{frames}"
    model, processor = from_pretrained(teacher, head="ctc"), load_processor(teacher)
    convert(model, LayerMap(partial(WindowedAttention, window=frames)))
    model.save_pretrained(folder)
    save_processor(processor, model, folder)
    return str(folder)


def _read(model: str, reader: str, audio: str, folder: Path, limit_s: float) -> dict[str, Any]:
    """What one way of reading makes of a recording, with seconds and peak memory; kept for these weights and audio."""
    case = {"model": model, "reader": reader, "audio": audio, "device": "cpu", "dtype": "float32"}
    key = case | {"content": [_content(path) for path in (*sorted(Path(model).glob("*.safetensors")), Path(audio))]}
    path = folder / f"{Path(audio).stem}-{reader}-{model.strip('/').replace('/', '_')}.json"
    if path.is_file() and (kept := json.loads(path.read_text()))["case"] == key:
        return kept["found"]
    found = run_case(case, limit_s)
    if "fault" not in found:
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps({"case": key, "found": found}))
    return found


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
