"""Many files: which there are, where their transcripts go, which are done, and what is left of one that was cut short.

A transcript is written as its words come, under the name ``talk.partial.srt``; complete, it becomes ``talk.srt``. So a
folder can be taken up again: files whose transcripts are complete are skipped.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import soundfile
import torch
from tqdm import tqdm

from cald_speech.data.audio import read_entry
from cald_speech.data.manifests import Entry, read_manifest
from cald_speech.errors import UserError
from cald_speech.longform.formats import Format
from cald_speech.longform.source import AudioSource
from cald_speech.longform.words import Word

Recognise = Callable[..., Iterator[Word]]  # called with an AudioSource and progress=(fraction) -> None
INTERRUPTED = 130  # the exit status after Ctrl-C


@dataclass(frozen=True)
class Job:
    """An audio file and the place of its transcript; None is the standard output.

    ``entry`` is what a manifest has of it: it may be a part of the file, and a text.
    """

    audio: Path
    target: Path | None
    entry: Entry | None = None
    name: str = ""  # in messages and transcripts; by default the file's

    def open(self) -> AudioSource:
        if self.entry is None or "start_s" not in self.entry:
            return AudioSource.open(self.audio)
        return AudioSource.from_samples(read_entry(self.entry))

    @property
    def partial(self) -> Path:
        """Where a transcript is written until it is complete."""
        return self.target.with_name(f"{self.target.stem}.partial{self.target.suffix}")


def find_jobs(paths: Sequence[Path], output: Path | None, suffix: str) -> list[Job]:
    """The files among ``paths``, and in the folders among them, whose structure the transcripts below ``output`` keep.

    Raises
    ------
    UserError
        for a folder without audio, or two files whose transcripts would have one name.

    Example
    -------
    >>> [job.target.name for job in find_jobs([Path("a/talk.flac")], Path("texts"), ".srt")]
    ['talk.srt']
    """
    jobs: dict[Path, Job] = {}
    for path in paths:
        for audio in _audio_in(path) if path.is_dir() else [path]:
            inside = audio.relative_to(path) if path.is_dir() else Path(audio.name)
            target = None if output is None else output / inside.with_suffix(suffix)
            other = jobs.setdefault(target or audio, Job(audio, target))
            if other.audio != audio:
                raise UserError(
                    f"the transcripts of {other.audio} and {audio} would both be {target}: give them to two calls, "
                    "with two folders for --output_folder"
                )
    return list(jobs.values())


def jobs_of(manifest: Path, output: Path | None, suffix: str) -> list[Job]:
    """The utterances of a manifest, whose ids are the names of their transcripts below ``output``."""
    jobs = []
    for name, entry in read_manifest(manifest).items():
        inside = Path(name + suffix)
        if inside.is_absolute() or ".." in inside.parts or len(name) > 200:
            inside = Path(f"{quote(name, safe='')[:200]}{suffix}")
        jobs.append(Job(Path(entry["audio"]), None if output is None else output / inside, entry, name))
    names: dict[Path, str] = {}
    for job in jobs if output is not None else ():
        other = names.setdefault(job.target, job.name)
        if other != job.name:
            raise UserError(f"the transcripts of {other} and {job.name} would both be {job.target}: give other ids")
    return jobs


def _audio_in(folder: Path) -> list[Path]:
    endings = {f".{name.lower()}" for name in soundfile.available_formats()} | {".opus", ".aif", ".aifc"}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not found:
        raise UserError(f"{folder}: expected audio files in this folder, but there are none that soundfile reads")
    return found


def run_jobs(jobs: Iterable[Job], recognise: Recognise, form: Format, *, overwrite: bool = False) -> int:
    """Transcribe file after file; the exit status is 0, 1 where a file had a fault, or 130 after Ctrl-C.

    What is wrong with one file is reported, and the next one is taken up.
    """
    status = 0
    for job in jobs:
        if job.target is not None and job.target.exists() and not overwrite:
            _say(f"{job.audio}: skipped, {job.target} is there")
            continue
        try:
            status = max(status, 0 if _run(job, recognise, form) else 1)
        except UserError as error:
            _say(f"error: {job.audio}: {str(error).removeprefix(f'{job.audio}: ')}")
            status = 1
        except torch.OutOfMemoryError:
            _say(
                f"error: {job.audio}: the device ran out of memory. Keep the buffers on disk with --storage, halve "
                "them with --dtype bfloat16, or take --device cpu"
            )
            status = 1
        except KeyboardInterrupt:
            _say(f"{job.audio}: interrupted")
            return INTERRUPTED
    return status


def _run(job: Job, recognise: Recognise, form: Format) -> bool:
    """Whether the whole file was transcribed. Raises KeyboardInterrupt once what had come is written."""
    start, source = time.perf_counter(), job.open()
    with _Bar(job.audio.name, source.duration_s) as bar, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        words = _UntilInterrupted(recognise(source, progress=bar.show))
        where = _write(job, form.write(words, recording=job.name or job.audio.stem), words, source)
    for warning in caught:
        _say(f"warning: {job.audio}: {str(warning.message).removeprefix('the audio: ')}")
    seconds, duration_s = time.perf_counter() - start, source.duration_s
    factor = f", real-time factor {seconds / duration_s:.4f}" if duration_s else ""
    _say(f"{job.audio}: {words.count} words in {duration_s:.1f} s of audio, {seconds:.1f} s{factor}{where}")
    if words.interrupted:
        raise KeyboardInterrupt
    return source.fault is None


def _write(job: Job, pieces: Iterable[str], words: "_UntilInterrupted", source: AudioSource) -> str:
    """Write the transcript piece by piece; returns where it went. No partial one is left that has no words."""
    if job.target is None:
        for piece in pieces:
            print(piece, end="", flush=True)
        return ""
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        with job.partial.open("w", encoding="utf-8") as file:
            for piece in pieces:
                file.write(piece)
                file.flush()
        if not words.interrupted and source.fault is None:
            os.replace(job.partial, job.target)
            return f" -> {job.target}"
    except OSError as error:
        raise UserError(f"the transcript cannot be written to {job.partial} ({error.strerror})") from error
    finally:
        if not words.count:
            job.partial.unlink(missing_ok=True)
    return f" -> {job.partial}" if words.count else ""


class _UntilInterrupted:
    """The words up to Ctrl-C, so that a format's end is written after them."""

    def __init__(self, words: Iterator[Word]):
        self.words, self.count, self.interrupted = words, 0, False

    def __iter__(self) -> Iterator[Word]:
        try:
            for word in self.words:
                self.count += 1
                yield word
        except KeyboardInterrupt:
            self.interrupted = True


class _Bar:
    """A progress bar over seconds of audio, with the real-time factor so far; silent where nobody watches."""

    def __init__(self, name: str, duration_s: float):
        form = "{desc}: {percentage:3.0f} %|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=duration_s, desc=name, bar_format=form, disable=None, leave=False)
        self.start = time.perf_counter()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self, fraction: float) -> None:
        """The fraction done so far, from 0 to 1."""
        done_s = fraction * self.bar.total
        factor = (time.perf_counter() - self.start) / max(done_s, 1e-9)
        self.bar.set_postfix_str(f"real-time factor {factor:.4f}", refresh=False)
        self.bar.update(done_s - self.bar.n)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
