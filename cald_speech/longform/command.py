"""The command line of `cald-speech transcribe` and `python -m cald_speech.longform`."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from cald_speech.errors import UserError
from cald_speech.longform.batch import find_jobs, run_jobs
from cald_speech.longform.formats import FORMATS
from cald_speech.longform.recogniser import Recogniser
from cald_speech.longform.words import DEFAULT_MARGINS, Margins

DTYPES = ("float32", "bfloat16", "float16")


def parser(prog: str) -> argparse.ArgumentParser:
    """The options; their help is what users read."""
    new = argparse.ArgumentParser(
        prog,
        description="Transcribe audio of any length in one exact pass, or find when the words of a known text are "
        "said. The exit status is 0, 1 where a file could not be read to its end, 2 where nothing could be done, 130 "
        "after Ctrl-C, which keeps what was transcribed.",
    )
    add = new.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="audio in any format and rate soundfile reads, or a folder")
    add("--model", required=True, help="folder or hub id of a model with a CTC head, and its processor")
    add("--format", choices=FORMATS, default="text", help="of the transcript (%(default)s)")
    add("--output", type=Path, help="folder for the transcripts, where complete ones are skipped (standard output)")
    add("--overwrite", action="store_true", help="make transcripts again that are complete")
    add("--text", type=Path, help="a file with all that is said: find its words' times instead of transcribing")
    add("--unknown", choices=("error", "drop"), default="error", help="characters of --text that the model lacks")
    add("--decoding", choices=("greedy", "beam"), default="greedy", help="best tokens, or best text (%(default)s)")
    add("--beam_width", type=int, default=16, help="prefixes of the beam search (%(default)s)")
    add("--lead_s", type=float, default=DEFAULT_MARGINS.lead_s, help="words begin before their tokens by (%(default)s)")
    add("--tail_s", type=float, default=DEFAULT_MARGINS.tail_s, help="words end after their tokens by (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda or cuda:1 (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and buffers (%(default)s)")
    add("--chunk_s", type=float, default=10.0, help="seconds in the front end at once, at most (%(default)s)")
    add("--storage", type=Path, help="folder for buffers as long as the audio; they leave no file behind (memory)")
    add("--force", action="store_true", help="run a model whose every layer kept attention, quadratic as it is")
    return new


def main(argv: Sequence[str], prog: str = "python -m cald_speech.longform") -> int:
    """Run the command; returns the exit status. Raises UserError where nothing could be done."""
    args = parser(prog).parse_intermixed_args(argv)
    form = FORMATS[args.format]
    jobs = find_jobs(args.files, args.output, form.suffix)
    text = None
    if args.text is not None:
        if len(jobs) != 1:
            raise UserError(f"--text is what one file says: expected one file, got {len(jobs)}")
        text = _read(args.text)
    dtype = getattr(torch, args.dtype)
    recogniser = Recogniser.of(args.model, dtype=dtype, device=args.device, force=args.force)
    options = {
        "margins": Margins(args.lead_s, args.tail_s),
        "chunk_s": args.chunk_s,
        "dtype": dtype,
        "storage": args.storage,
    }
    if text is None:
        recognise = partial(recogniser.transcribe, decoding=args.decoding, beam_width=args.beam_width, **options)
    else:
        recognise = partial(recogniser.align, text=text, unknown=args.unknown, **options)
    return run_jobs(jobs, recognise, form, overwrite=args.overwrite)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a text file in UTF-8, which cannot be read: {error}") from error
