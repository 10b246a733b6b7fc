"""A Python for scripts that start many: each start is a fork of a process that has imported what takes seconds.

    with forking_python(["torch"]) as python:
        subprocess.run([python, "-c", "import torch"])

Run as a script, this file is that process.
"""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

# What is executed in the place of python: it hands over its words, folder, environment and standard streams.
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({place!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "little")], [0, 1, 2])
    server.sendall(request)
    sys.exit(server.recv(1)[0])
"""


@contextmanager
def forking_python(modules: Sequence[str]) -> Iterator[Path]:
    """An executable that takes the words python takes, for as long as the context lasts."""
    folder = Path(tempfile.mkdtemp())  # and not pytest's: the path of a socket has 107 characters at most
    place, client = folder / "socket", folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, place=str(place)))
    client.chmod(0o755)
    command = [sys.executable, __file__, place, *modules]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert server.stdout.readline() == b"ready\n"
        yield client
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with what it started, where that has not ended
        server.wait()
        server.stdout.close()
        shutil.rmtree(folder)


def _serve(place: str, *modules: str) -> None:
    for module in modules:
        import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who ended is not waited for: the client is told
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            size, streams, *_ = socket.recv_fds(connection, 4, 3)
            request = connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
            if os.fork() == 0:
                status = _run(*json.loads(request), streams)
                connection.sendall(bytes([status]))
                os._exit(status)
            for number in (*streams, connection.detach()):
                os.close(number)


def _run(words: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> int:
    """What python does with the words; the exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words[1:] if words[0] == "-c" else words
    sys.path[0] = str(Path(words[0]).resolve().parent) if Path(words[0]).is_file() else ""
    status = 0
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-":
            exec(sys.stdin.read(), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve(*sys.argv[1:])
