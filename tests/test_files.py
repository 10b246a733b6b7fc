"""Folders and files are the old ones or the new ones, whenever the process ends; what two could mix is one's alone."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cald_speech import files
from cald_speech.errors import UserError
from cald_speech.files import InUse, clear, locked, settle, sweep, whole_file, whole_folder
from cald_speech.output import held
from tests.faults.kills import Job, call, files_in

OLD = {"config.json": "old", "model": "old", "in/notes": "mine"}
NEW = {"config.json": "new", "model": "new"}


def write(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def replace(folder: Path) -> None:
    with whole_folder(folder / "model", keep_others=True) as unfinished:
        write(unfinished, NEW)


WAYS = {"exchanged": [], "by two renames": ["_exchanged"], "file by file": ["_exchanged", "_replaced"]}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_is_replaced_at_once_wherever_the_process_is_killed(tmp_path, monkeypatch, way):
    for name in WAYS[way]:
        monkeypatch.setattr(files, name, lambda *arguments: False)
    whole = {"exchanged": [OLD, OLD | NEW], "by two renames": [OLD, OLD | NEW, {}], "file by file": [OLD, OLD | NEW]}[
        way
    ]
    job, at, status = Job(replace), 3, None  # nothing is there before
    while status is None:
        at += 1
        write(tmp_path / str(at) / "model", OLD)
        status, *_ = call(job, tmp_path / str(at), at=at)
        left = read(tmp_path / str(at) / "model")
        # Moved one by one, the files are a model again with the last of them.
        assert left in whole or ("config.json" not in left and way == "file by file"), (at, left)
        if left == {}:
            sweep(tmp_path / str(at))
            assert read(tmp_path / str(at) / "model") == OLD
        replace(tmp_path / str(at))
        assert read(tmp_path / str(at)) == {f"model/{name}": text for name, text in (OLD | NEW).items()}
    assert at > 5


def test_a_folder_without_what_the_old_one_had(tmp_path):
    write(tmp_path / "model", OLD)
    (tmp_path / "link").symlink_to("model")
    with whole_folder(tmp_path / "link") as unfinished:
        write(unfinished, NEW)
    assert read(tmp_path / "model") == NEW and (tmp_path / "link").is_symlink()
    (tmp_path / "file").write_text("a file")
    with pytest.raises(NotADirectoryError), whole_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "a file"


def test_the_working_folder_stays_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "model", OLD))
    replace(tmp_path)
    assert read(Path.cwd()) == OLD | NEW and os.stat(".").st_ino == (tmp_path / "model").stat().st_ino


def test_what_gets_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """First the content, then the name, then the folder that has the name; also where a checkpoint gets its own."""
    done, replaced = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    monkeypatch.setattr(os, "sync", lambda: done.append("all"))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(f"-> {Path(new).name}") or replaced(old, new))
    with whole_file(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("a")
    assert done == [unfinished.name, "-> a.txt", tmp_path.name]
    done.clear()
    with whole_folder(tmp_path / "model") as made:
        write(made, {"weights": "w"})
    assert done == ["weights", "model", "-> model", tmp_path.name]
    done.clear()
    with whole_file(tmp_path / "b.txt", durable=False) as unfinished:
        unfinished.write_text("b")
    settle()
    assert done == ["-> b.txt", "all"]


def test_strays_are_told_from_names_of_users(tmp_path):
    mine = [".notes.2024.txt", ".a.1.txt", ".x.99999999.json", f".b.{os.getppid()}.unfinished.txt", "c.9.unfinished"]
    strays = [".a.99999999.unfinished.txt", f".d.{os.getpid()}.unfinished", ".e.99999999.old"]
    for name in (*mine, *strays):
        (tmp_path / name).touch()
    (tmp_path / "e").touch()
    long_ago = time.time() - 1e6
    os.utime(tmp_path / strays[1], (long_ago, long_ago))  # of a process that had our number before
    clear(tmp_path / "a.txt")
    assert not (tmp_path / strays[0]).exists() and (tmp_path / strays[1]).exists()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "e"])


@pytest.fixture
def other(tmp_path):
    """Another process that holds a folder's part called "test", until it is told to end."""
    code = (
        "import sys; from cald_speech.files import locked\n"
        "with locked(sys.argv[1], 'test'): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_what_another_process_holds(other, tmp_path, caplog):
    told = rf"^{tmp_path}/test is in use by another process \(process {other.pid} on .*\): wait for it or end it"
    with pytest.raises(UserError, match=told), held(tmp_path, "test"):
        pass
    with pytest.raises(InUse), locked(tmp_path, "test"):
        pass
    with held(tmp_path), held(tmp_path):  # the folder as a whole; a process may hold what it holds
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".test.lock"}
    assert not (tmp_path / ".lock").exists()
    caplog.set_level(logging.INFO)
    other.send_signal(signal.SIGCONT)
    os.kill(other.pid, signal.SIGSTOP)
    if os.fork() == 0:  # ends the other one once we wait for it
        time.sleep(0.2)
        os.kill(other.pid, signal.SIGKILL)
        os._exit(0)
    with locked(tmp_path, "test", wait=True):
        assert "waiting for it" in caplog.text
    os.wait3(0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"--output_folder .*file: expected a folder to write to"),
        held(tmp_path / "file"),
    ):
        pass


def test_files_in_is_what_is_compared(tmp_path):
    write(tmp_path, {"a": f"of {tmp_path}"})
    assert files_in(Job(replace), tmp_path) == {"a": b"of <folder>"}
