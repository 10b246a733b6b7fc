"""``cald-speech transcribe`` and ``align``: what audio of any length says, and when a known text is said."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from cald_speech.commands import options
from cald_speech.commands.jobs import INTERRUPTED, find_jobs, jobs_of, run_jobs
from cald_speech.data.encodings import read_text
from cald_speech.data.text import normalise
from cald_speech.errors import UserError
from cald_speech.longform.formats import FORMATS
from cald_speech.longform.recogniser import Recogniser
from cald_speech.longform.words import DEFAULT_MARGINS, Margins
from cald_speech.output import held

MODEL = click.option(
    "--model",
    type=options.ModelSource(),
    required=True,
    help="Folder or hub id of a model with a CTC head, and its processor.",
)
DECODING = options.together(
    click.option(
        "--decoding",
        type=click.Choice(["greedy", "beam"]),
        default="greedy",
        show_default=True,
        help="Best tokens, or best text.",
    ),
    click.option("--beam_width", default=16, show_default=True, help="Prefixes of the beam search."),
)
UNKNOWN = click.option(
    "--unknown",
    type=click.Choice(["error", "drop"]),
    default="error",
    show_default=True,
    help="Characters of the text that the model lacks.",
)
OF_THE_TEXT = options.together(
    UNKNOWN, options.normaliser("none", "How the text is written before it is aligned, such as tedlium: no {BREATH}.")
)
MARGINS = options.together(
    click.option(
        "--lead_s",
        default=DEFAULT_MARGINS.lead_s,
        show_default=True,
        help="Seconds by which words begin before their tokens.",
    ),
    click.option(
        "--tail_s", default=DEFAULT_MARGINS.tail_s, show_default=True, help="Seconds by which words end after them."
    ),
)
FORMAT = click.option(
    "--format", "form", type=click.Choice(list(FORMATS)), default="text", show_default=True, help="Of the transcript."
)
OUTPUT = options.together(
    click.option(
        "--output_folder",
        "--output",
        type=Path,
        help="For transcripts; complete ones are skipped. Default: print.",
    ),
    click.option("--overwrite", is_flag=True, help="Make transcripts again that are complete."),
)
RUN = options.together(
    options.target_lang(),
    options.device(),
    options.dtype("Of weights and buffers; int8: of the layers' linear maps, on a CPU.", int8=True),
    click.option("--chunk_s", default=10.0, show_default=True, help="Seconds in the front end at once, at most."),
    click.option(
        "--storage", type=Path, help="Folder for buffers as long as the audio; they leave no file. Default: memory."
    ),
    click.option("--force", is_flag=True, help="Run a model whose every layer kept attention, quadratic as it is."),
)


@options.command()
@click.argument("files", metavar="[FILE]...", nargs=-1, type=Path)
@options.manifest("--manifest", meaning="A corpus in any format, in the place of FILE.", required=False, texts=False)
@MODEL
@FORMAT
@OUTPUT
@click.option("--text", type=Path, help="A file with all that is said: the same as `cald-speech align`.")
@OF_THE_TEXT
@DECODING
@MARGINS
@RUN
def transcribe(files: tuple[Path, ...], text: Path | None, manifest: Path | None, **given: Any) -> int:
    """Transcribe audio of any length in one exact pass.

    FILE is audio in any format and rate that soundfile reads (with the extra `formats` also m4a, mp4, webm and the
    like), or a folder of it. Of a manifest's utterances the ids are the names of the transcripts. The exit status is 1
    where a file could not be read to its end, and 130 after Ctrl-C, which keeps what was transcribed.
    """
    if bool(files) == (manifest is not None) or (text is not None and manifest is not None):
        raise click.UsageError("expected FILE..., or --manifest without --text")
    options.refuse_idle(
        unknown=(text is not None, "--text"),
        normaliser=(text is not None, "--text"),
        beam_width=(text is None and given["decoding"] == "beam", "--decoding beam, and without --text"),
        decoding=(text is None, "no --text, whose words are known"),
    )
    return _recognise(files, text, manifest, **given)


@options.command()
@click.argument("file", type=Path, required=False)
@click.argument("text", type=Path, required=False)
@options.manifest("--manifest", meaning="A corpus in any format, with texts, in the place of both.", required=False)
@MODEL
@FORMAT
@OUTPUT
@OF_THE_TEXT
@MARGINS
@RUN
def align(file: Path | None, text: Path | None, manifest: Path | None, **given: Any) -> int:
    """Find when the words of TEXT, a file with all that is said, are spoken in FILE, audio of any length.

    --format json, srt, vtt or ctm writes the times.
    """
    if (file is None or text is None) if manifest is None else file is not None:
        raise click.UsageError("expected FILE and TEXT, or --manifest")
    files = () if file is None else (file,)
    return _recognise(files, text, manifest, aligns=True, decoding=None, beam_width=None, **given)


def _recognise(
    files: tuple[Path, ...],
    text: Path | None,
    manifest: Path | None,
    *,
    aligns: bool = False,
    model: str,
    form: str,
    output_folder: Path | None,
    overwrite: bool,
    unknown: str,
    normaliser: str,
    decoding: str | None,
    beam_width: int | None,
    lead_s: float,
    tail_s: float,
    device: str,
    dtype: torch.dtype,
    chunk_s: float,
    storage: Path | None,
    force: bool,
    target_lang: str | None,
) -> int:
    """Transcribe each file, or align those with a text. Raises UserError where nothing could be done."""
    options.refuse_idle(overwrite=(output_folder is not None, "--output_folder"))
    suffix = FORMATS[form].suffix
    jobs = find_jobs(files, output_folder, suffix) if manifest is None else jobs_of(manifest, output_folder, suffix)
    if text is not None and len(jobs) != 1:
        raise UserError(f"--text is what one file says: expected one file, got {len(jobs)}")
    said = None if text is None else read_text(text, "a text file")
    recogniser = Recogniser.of(model, dtype=dtype, device=device, force=force, target_lang=target_lang)
    how = {"margins": Margins(lead_s, tail_s), "chunk_s": chunk_s, "dtype": dtype, "storage": storage}
    with nullcontext() if output_folder is None else held(output_folder):
        if said is None and not aligns:
            recognise = partial(recogniser.transcribe, decoding=decoding, beam_width=beam_width, **how)
            return run_jobs(jobs, recognise, FORMATS[form], overwrite=overwrite)
        status = 0
        for job in jobs:
            words = normalise(job.entry["text"] if said is None else said, normaliser)
            recognise = partial(recogniser.align, text=words, unknown=unknown, **how)
            status = max(status, run_jobs([job], recognise, FORMATS[form], overwrite=overwrite))
            if status == INTERRUPTED:
                break
        return status
