"""Commands that are killed, and called again: what is there then is what an undisturbed run leaves, to the bit.

Each call is a forked process. It kills itself before its n-th operation on files, or is killed after some time.
Whatever has its final name then is whole. The same command again, after up to three kills in a row, ends well, and
leaves the files of a run that nothing disturbed, and no others.
"""

import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import click
import torch
import yaml
from tqdm import tqdm

from cald_speech import LayerMap, convert
from cald_speech.commands.convert import convert as convert_command
from cald_speech.commands.evaluate import evaluate as evaluate_command
from cald_speech.commands.transcribe import transcribe as transcribe_command
from cald_speech.data.readers import prepare_corpus
from cald_speech.errors import error_epilogue
from cald_speech.mixers import Bidirectional
from cald_speech.ops.native import compiler
from cald_speech.ops.native.kept import NotBuilt
from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.training.run import _writing_to, train
from tests.data.corpora import COLUMNS, FORMATS, miniature, write
from tests.evaluation.layerwise import rewrite, write_recordings, write_teacher
from tests.faults.recipes import preparations
from tests.training.miniature import SPLITS, write_corpus, write_experiment, write_model

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
UNFINISHED = re.compile(r"(^|/)(\.[^/]*|unfinished\+[^/]*|compiling-[^/]*|[^/]*\.partial\.[^/]*)(/|$)")
Files = dict[str, bytes]


@dataclass(frozen=True)
class Job:
    """A command that writes below a folder.

    set_up : what is in the folder before.
    call : runs in the forked process; what it raises, or an exit status that is not 0, is a fault.
    plain : of a file, by name and content, what two runs must agree in; None where they need not.
    grows : what is written in the course of it, by the starts of names; it is looked at when the command has ended.
    is_one_folder : after a kill all is the old or the new; else each file that has its final name.
    """

    call: Callable[[Path], object]
    set_up: Callable[[Path], object] = lambda folder: None
    plain: Callable[[str, bytes], bytes | None] = lambda name, content: content
    grows: tuple[str, ...] = ()
    is_one_folder: bool = False


# --- a process that is killed -----------------------------------------------------------------------------------------


def call(job: Job, folder: Path, *, at: int | None = None, after_s: float | None = None) -> tuple[int | None, int, str]:
    """Run it in a fork; returns its exit status (None: it was killed), how many operations it did, what it said."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+") as said:
        process = os.fork()
        if process == 0:
            os.close(reading)
            os._exit(_in_the_fork(job, folder, at, said.fileno(), writing))
        os.close(writing)
        try:
            if after_s is not None:
                time.sleep(after_s)
                os.kill(process, signal.SIGKILL)  # a zombie, where it has ended before
            _, status = os.waitpid(process, 0)
        except BaseException:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # a compiler that goes on without it
            count = os.read(reading, 100)
            os.close(reading)
        said.seek(0)
        text = said.read()
    status = os.waitstatus_to_exitcode(status)
    return None if status == -signal.SIGKILL else status, int(count or 0), text


def to_its_end(job: Job, folder: Path) -> int:
    """The same, all well; returns how many operations it did."""
    status, count, text = call(job, folder)
    assert status == 0, f"it ended with status {status}:\n{text}"
    return count


def _in_the_fork(job: Job, folder: Path, at: int | None, said: int, writing: int) -> int:
    count = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES and str(args[0]) != os.devnull
        if event in CHANGES or writes:
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 0
    try:
        os.setpgid(0, 0)
        signal.alarm(0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        for stream in (1, 2):
            os.dup2(said, stream)
        sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1, closefd=False)
        os.environ["CALD_SPEECH_NATIVE"] = "0"  # compiling them takes longer than all else
        for bar in _with_all_below(tqdm):
            bar.set_lock(threading.RLock())  # its own is shared with the forks before: one was killed with it
        sys.addaudithook(watch)
        job.call(folder)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    os.write(writing, str(count).encode())
    return status


def _with_all_below(of: type) -> list[type]:
    return [of, *(each for below in of.__subclasses__() for each in _with_all_below(below))]


# --- what must be there -----------------------------------------------------------------------------------------------


def files_in(job: Job, folder: Path) -> Files:
    """Every file below the folder by its name; what two runs need not agree in is left out."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        content = job.plain(name, path.read_bytes().replace(str(folder).encode(), b"<folder>"))
        if content is not None:
            found[name] = content
    return _numbered(found)


def _numbered(found: Files) -> Files:
    """Checkpoints by the order of their contents: their names are the times when they were written."""
    names = {name.split("/")[2] for name in found if name.startswith("run/checkpoints/")}
    whole = {
        each: tuple(
            sorted((n.split("/")[-1], c) for n, c in found.items() if n.split("/")[1:3] == ["checkpoints", each])
        )
        for each in names
    }
    numbers = {each: f"CKPT{place}" for place, each in enumerate(sorted(names, key=lambda each: whole[each]))}
    return {re.sub(r"(?<=^run/checkpoints/)[^/]+", lambda m: numbers[m[0]], n): c for n, c in found.items()}


def different(found: Files, expected: Files) -> list[str]:
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return [f"{n} ({'not there' if n not in found else 'too much' if n not in expected else 'differs'})" for n in names]


@cache
def undisturbed(name: str) -> tuple[Files, Files, int, float]:
    """The files before and after it, how many operations on files it does, and how many seconds it takes."""
    job, folder = jobs()[name], Path(tempfile.mkdtemp(prefix="undisturbed-"))
    try:
        job.set_up(folder)
        before, start = files_in(job, folder), time.perf_counter()
        count = to_its_end(job, folder)
        return before, files_in(job, folder), count, time.perf_counter() - start
    finally:
        shutil.rmtree(folder)


done = Counter()  # kills of each command by this process
LIMIT_S = 300  # some processes, each of which may take seconds on a machine that is busy


def killed(names: Iterable[str], rng: random.Random, folder: Path) -> None:
    """Kill it once or more, look at what is there each time, call it again, and compare."""
    name = rng.choice([*names])
    job = jobs()[name]
    before, after, operations, seconds = undisturbed(name)
    job.set_up(folder)
    for _ in range(rng.choice([1, 2, 3])):
        at, after_s = 1 + rng.randrange(operations), rng.random() * seconds
        by_time = rng.random() < 0.5
        status, _, text = call(job, folder, **({"after_s": after_s} if by_time else {"at": at}))
        if status is not None:  # it was quicker than the first time
            assert status == 0, f"it ended with status {status}:\n{text}"
            by_time, (status, *_) = False, call(job, folder, at=1)
        how = f"after {after_s:.3f} s" if by_time else f"before operation {at} of {operations}"
        check_whole(job, folder, before, after, f"{name} killed {how}")
        done[name.split()[0]] += 1
    to_its_end(job, folder)
    wrong = different(files_in(job, folder), after)
    assert not wrong, f"{name} killed {how}, and called again: {', '.join(wrong)}"


def check_whole(job: Job, folder: Path, before: Files, after: Files, what: str) -> None:
    """What has its final name is what it was before, or what it is to be."""
    found = {name: content for name, content in files_in(job, folder).items() if not UNFINISHED.search(name)}
    if job.is_one_folder:
        assert found in ({}, before, after), f"{what}: {different(found, after)} against the new one"
        return
    for name, content in found.items():
        if not name.startswith(job.grows):
            assert content in (before.get(name), after.get(name)), f"{what}: {name} is neither the old nor the new one"


# --- the commands -----------------------------------------------------------------------------------------------------


@cache
def place() -> Path:
    """Corpora and models of a few kilobytes, made once for this process."""
    torch.set_num_threads(1)  # a fork has no other threads
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    write_corpus(folder / "LibriSpeech")
    source = write_teacher(folder / "source", layers=2)
    rewrite(source, folder / "student", lambda model: convert(model, LayerMap(partial(Bidirectional))))
    write_recordings(folder, folder / "student")
    write_model(folder / "teacher", hidden_dropout=0.1)
    (folder / "audio").mkdir()
    for path in folder.glob("*.wav"):
        path.rename(folder / "audio" / path.name)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f"{folder}/", f"{folder}/audio/"))
    return folder


def call_command(command: click.Command, *words: object) -> None:
    command([str(word) for word in words])


def call_train(folder: Path) -> None:
    keys = {
        "output_folder": str(folder / "run"),
        "data_folder": str(place() / "LibriSpeech"),
        "corpus": {"splits": SPLITS},
        "teacher": str(place() / "teacher"),
        "guidance": "target",
        "alpha_logits": 1.0,
        "model_overrides": {"hidden_dropout": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2},
        "num_steps": 3,
        "max_batch_s": 7.0,
        "log_every_steps": 1,
        "checkpoint_every_steps": 1,
        "waypoint_every_steps": 2,
    }
    experiment = folder / "experiment.yaml"
    if not experiment.exists():
        write_experiment(experiment, **keys)
    train([str(experiment), "--noprogressbar"], prepare)


def plain_run(name: str, content: bytes) -> bytes | None:
    if name.startswith("run/tensorboard/") or name == "experiment.yaml":
        return None
    if name == "run/run.json":
        json.loads(content)
        return None
    if name.endswith("CKPT.yaml") and content:
        return json.dumps(
            {k: v for k, v in yaml.safe_load(content).items() if k != "unixtime"}, sort_keys=True
        ).encode()
    return content


def call_convert(folder: Path) -> None:
    call_command(convert_command, place() / "source", folder / "model")


def older_model(folder: Path) -> None:
    """Another model in the place of the new one, and what else somebody keeps there."""
    shutil.copytree(place() / "teacher", folder / "model")
    (folder / "model/notes.txt").write_text("of the older one")


def call_evaluate(folder: Path) -> None:
    words = ["--output_folder", folder / "out", "--quiet"]
    call_command(evaluate_command, folder / "model", place() / "manifest.json", *words)


def plain_report(name: str, content: bytes) -> bytes:
    return re.sub(rb'"seconds": [\d.e-]+', b"", content)


def converted_model(folder: Path) -> None:
    shutil.copytree(place() / "student", folder / "model")
    (folder / "model/cald.json").write_text('{"steps": 3}')


def call_transcribe(folder: Path) -> None:
    words = ["--model", place() / "student", "--format", "json", "--output_folder", folder / "out"]
    call_command(transcribe_command, place() / "audio", *words)


@cache
def corpora() -> dict[str, Path]:
    return {name: write(name, place() / f"corpus{n}" / "data", miniature()) for n, name in enumerate(FORMATS)}


def call_compile(folder: Path, endings: Mapping[str, str]) -> None:
    """The smallest of the sources: how a compilation is kept does not depend on how long it takes."""
    os.environ["CALD_SPEECH_CACHE"] = str(folder / "cache")
    compiler.sources = lambda wanted: [compiler.SHARED / name for name in endings[wanted]]
    try:
        assert compiler.build().library.cald_tensor_fields
    except NotBuilt as error:
        sys.exit(f"error: {error}")


@cache
def jobs() -> dict[str, Job]:
    place()
    found = {
        "train": Job(call_train, plain=plain_run, grows=("run/checkpoints/", "run/train_log.jsonl", "run/model/")),
        "convert": Job(call_convert, is_one_folder=True),
        "convert over a model": Job(call_convert, older_model, is_one_folder=True),
        "evaluate": Job(call_evaluate, converted_model, plain=plain_report),
        "transcribe": Job(call_transcribe),
        "compile": Job(partial(call_compile, endings={"c": ["tensor.c"], "ch": ["tensor.c", "tensor.h"]})),
    }
    for name, source in corpora().items():
        found[f"prepare {name}"] = Job(partial(_as_in_training, partial(_prepare, name, source)))
    for name, of in preparations(place() / "recipes").items():
        found[f"prepare {name}"] = Job(partial(_as_in_training, of))
    gc.collect()
    gc.freeze()  # a fork that looks through them copies them
    return found


def _prepare(name: str, source: Path, folder: Path) -> None:
    prepare_corpus(folder / "manifests/train.json", source, columns=COLUMNS.get(name))


def _as_in_training(of: Callable[[Path], object], folder: Path) -> None:
    with error_epilogue(), _writing_to(folder):
        of(folder)


def killed_prepare(rng: random.Random, folder: Path) -> None:
    killed([name for name in jobs() if name.startswith("prepare ")], rng, folder)


GENERATORS = {
    "killed train": partial(killed, ["train"]),
    "killed prepare": killed_prepare,
    "killed convert": partial(killed, ["convert", "convert over a model"]),
    "killed evaluate": partial(killed, ["evaluate"]),
    "killed transcribe": partial(killed, ["transcribe"]),
    "killed compile": partial(killed, ["compile"]),
}
for generator in GENERATORS.values():
    generator.limit_s = LIMIT_S
