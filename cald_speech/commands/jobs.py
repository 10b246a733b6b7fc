"""Many files: which there are, where their transcripts go, which are done, and what is left of one that was cut short.

A transcript is written as its words come, under the name ``talk.partial.srt``; complete, it becomes ``talk.srt``. So a
folder can be taken up again: files whose transcripts are complete are skipped.
"""

import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import torch
from tqdm import tqdm

from cald_speech.audio_files.names import is_audio, is_companion, is_ending
from cald_speech.data.audio import read_entry
from cald_speech.data.manifests import Entry, read_manifest
from cald_speech.errors import UserError, on_one_line, some_of
from cald_speech.files import LONGEST_NAME, put, short_name
from cald_speech.longform.formats import Format
from cald_speech.longform.source import AudioSource
from cald_speech.longform.words import Word

Recognise = Callable[..., Iterator[Word]]  # called with an AudioSource and progress=(fraction) -> None
INTERRUPTED = 130  # the exit status after Ctrl-C
DONE, SKIPPED, IN_PART, FAILED = OUTCOMES = ("done", "skipped", "in part, to where a fault is", "not done")


@dataclass(frozen=True)
class Job:
    """An audio file and the place of its transcript; None is the standard output.

    ``entry`` is what a manifest has of it: it may be a part of the file, and a text.
    """

    audio: Path
    target: Path | None
    entry: Entry | None = None
    name: str = ""  # in messages and transcripts; by default the file's

    fault: str = ""  # why it cannot be done, known from the start

    def at(self, target: Path) -> "Job":
        return replace(self, target=target)

    def open(self) -> AudioSource:
        if self.fault:
            raise UserError(self.fault)
        if self.entry is None or "start_s" not in self.entry:
            return AudioSource.open(self.audio)
        return AudioSource.from_samples(read_entry(self.entry))

    @property
    def partial(self) -> Path:
        """Where a transcript is written until it is complete."""
        name = f"{self.target.stem}.partial{self.target.suffix}"
        if len(os.fsencode(name)) > LONGEST_NAME:
            name = f"{short_name(self.target.stem, LONGEST_NAME - 20)}.partial{self.target.suffix}"
        return self.target.with_name(name)


def find_jobs(paths: Sequence[Path], output: Path | None, suffix: str) -> list[Job]:
    """The files among ``paths``, and in the folders among them, whose structure the transcripts below ``output`` keep.

    Where two would have one transcript (``talk.wav`` and ``talk.mp3``), its name keeps their endings. What is passed
    over in a folder is said.

    Raises
    ------
    UserError
        for a folder without audio.

    Example
    -------
    >>> [job.target.name for job in find_jobs([Path("a/talk.flac")], Path("texts"), ".srt")]
    ['talk.srt']
    >>> [job.target.name for job in find_jobs([Path("a/talk.flac"), Path("a/talk.mp3")], Path("texts"), ".srt")]
    ['talk.flac.srt', 'talk.mp3.srt']
    """
    jobs: list[Job] = []
    for path in paths:
        if not path.is_dir():
            jobs.append(Job(path, None if output is None else output / path.name))
            continue
        inside = _audio_in(path, output)
        jobs += inside if output is None else [job.at(output / job.audio.relative_to(path)) for job in inside]
    jobs = list({os.path.abspath(job.audio): job for job in reversed(jobs)}.values())[::-1]
    return jobs if output is None else _named(jobs, suffix)


def _named(jobs: list[Job], suffix: str) -> list[Job]:
    """The jobs, whose targets so far are named as the audio, with names of transcripts that differ."""
    full: set[Path] = set()
    while True:
        targets = [_transcript(job.target, suffix, full=job.audio in full) for job in jobs]
        count = Counter(targets)
        more = {job.audio for job, target in zip(jobs, targets, strict=True) if count[target] > 1} - full
        if not more:
            break
        full |= more
    first: dict[Path, Path] = {}
    named = []
    for job, target in zip(jobs, targets, strict=True):
        other = first.setdefault(target, job.audio)
        taken = (
            f"its transcript would be {target}, as that of {other}: give it another --output_folder, in another call"
        )
        named.append(replace(job, target=target, fault=job.fault or (taken if other != job.audio else "")))
    return named


def _transcript(audio: Path, suffix: str, *, full: bool) -> Path:
    """The name of a transcript; ``talk.partial.wav`` keeps its ending, as ``talk.partial.txt`` is talk.wav's."""
    stem = audio.stem if is_ending(audio.suffix) else audio.name
    name = audio.name if full or stem.endswith(".partial") else stem
    if len(os.fsencode(name + suffix)) > LONGEST_NAME:
        name = short_name(name, LONGEST_NAME - len(suffix))
    return audio.with_name(name + suffix)


def jobs_of(manifest: Path, output: Path | None, suffix: str) -> list[Job]:
    """The utterances of a manifest, whose ids are the names of their transcripts below ``output``."""
    jobs = []
    for name, entry in read_manifest(manifest).items():
        inside = Path(name + suffix)
        too_long = any(len(os.fsencode(part)) > LONGEST_NAME for part in inside.parts) or len(name) > 1000
        if inside.is_absolute() or ".." in inside.parts or too_long or not name or "\0" in name:
            inside = Path(f"{short_name(quote(name, safe='') or '%00', 200)}{suffix}")
        if inside.stem.endswith(".partial"):  # which is another's until it is complete
            inside = inside.with_name(f"{inside.stem.removesuffix('.partial')}%2Epartial{suffix}")
        jobs.append(Job(Path(entry["audio"]), None if output is None else output / inside, entry, name))
    names: dict[Path, str] = {}
    for job in jobs if output is not None else ():
        other = names.setdefault(job.target, job.name)
        if other != job.name:
            raise UserError(f"the transcripts of {other} and {job.name} would both be {job.target}: give other ids")
    return jobs


def _audio_in(folder: Path, output: Path | None) -> list[Job]:
    """The audio below a folder, links included, and what of it cannot be looked into; what is no audio is said."""
    found: list[Job] = []
    passed, seen = Counter(), set()

    def unreadable(error: OSError) -> None:
        found.append(Job(Path(error.filename), None, fault=f"this folder cannot be read ({error.strerror})"))

    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(place)
        # A link to a folder above, or the transcripts of before, which may also lie beside the audio.
        is_output = output is not None and real == os.path.realpath(output) != os.path.realpath(folder)
        if real in seen or is_output:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for path in (Path(place, name) for name in names):
            if is_companion(path):
                passed["macOS companions"] += 1
            elif is_audio(path):
                found.append(Job(path, None))
            else:
                passed[path.suffix or "without an ending"] += 1
    if passed:
        kinds = some_of([f"{count} {kind}" for kind, count in passed.most_common()], separator=", ")
        _say(f"{folder}: passed over what is no audio: {kinds}")
    if not found:
        raise UserError(f"{folder}: expected audio files in this folder, but there are none")
    return sorted(found, key=lambda job: job.audio)


def run_jobs(jobs: Sequence[Job], recognise: Recognise, form: Format, *, overwrite: bool = False) -> int:
    """Transcribe file after file; the exit status is 0, 1 where a file had a fault, or 130 after Ctrl-C.

    What is wrong with one file is reported, whatever it is, and the next one is taken up. Of several the last line
    says what became of them.
    """
    counts = Counter()
    for job in jobs:
        try:
            became = _one(job, recognise, form, overwrite=overwrite)
        except KeyboardInterrupt:
            _say(f"{job.audio}: interrupted")
            return INTERRUPTED
        counts[became] += 1
    if len(jobs) > 1:
        _say(f"{len(jobs)} files: " + ", ".join(f"{counts[became]} {became}" for became in OUTCOMES if counts[became]))
    return int(counts[IN_PART] + counts[FAILED] > 0)


def _one(job: Job, recognise: Recognise, form: Format, *, overwrite: bool) -> str:
    """Transcribe one file; returns what became of it."""
    try:
        if job.target is not None and not job.fault and job.target.is_dir():
            raise UserError(f"its transcript would be {job.target}, which is a folder: give another --output_folder")
        if job.target is not None and not job.fault and job.target.exists() and not overwrite:
            _say(f"{job.audio}: skipped, {job.target} is there")
            return SKIPPED
        return DONE if _run(job, recognise, form) else IN_PART
    except UserError as error:
        what = str(error).removeprefix(f"{job.audio}: ")
    except torch.OutOfMemoryError:
        what = (
            "the device ran out of memory. Keep the buffers on disk with --storage, halve them with --dtype bfloat16, "
            "or take --device cpu"
        )
    except Exception as error:  # one file never ends a batch
        what = f"expected to read and transcribe this file, but it failed: {type(error).__name__}: {error}"
    _say(f"error: {job.audio}: {what}")
    return FAILED


def _run(job: Job, recognise: Recognise, form: Format) -> bool:
    """Whether the whole file was transcribed. Raises KeyboardInterrupt once what had come is written."""
    start, source = time.perf_counter(), job.open()
    with _Bar(job.audio.name, source) as bar, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        words = _UntilInterrupted(recognise(source, progress=bar.show))
        where = _write(job, form.write(words, recording=_printable(job.name or job.audio.stem)), words, source)
    if source.note:
        _say(f"warning: {job.audio}: {source.note}")
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
            put(job.partial, job.target)
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

    def __init__(self, name: str, source: AudioSource):
        form = "{desc}: {percentage:3.0f} %|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
        self.source = source
        self.bar = tqdm(total=1.0, desc=_printable(name), bar_format=form, disable=None, leave=False)
        self.start = time.perf_counter()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self, fraction: float) -> None:
        """The fraction done so far, from 0 to 1."""
        self.bar.total = self.source.duration_s  # which is known for sure once the audio was read
        done_s = fraction * self.bar.total
        factor = (time.perf_counter() - self.start) / max(done_s, 1e-9)
        self.bar.set_postfix_str(f"real-time factor {factor:.4f}", refresh=False)
        self.bar.update(done_s - self.bar.n)


def _say(line: str) -> None:
    tqdm.write(_printable(line), file=sys.stderr)


def _printable(name: str) -> str:
    """Names of files may hold bytes that are no text, and what a terminal would obey."""
    return on_one_line(name.encode("utf-8", "backslashreplace").decode("utf-8"))
