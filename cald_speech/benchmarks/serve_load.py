"""What ``cald-speech serve`` takes: many clients at once, an hour in one upload, and clients that are killed.

    cald-speech benchmark serve MODEL AUDIO... --clients 32 --seconds 60 --hours 1

MODEL is served by a process of its own. AUDIO is recordings, or folders of them: the first ``--clips`` are what the
clients send, each again as soon as it is answered, and all, joined and repeated, are the long upload. An answer is lost
where it is no 200 within ten minutes, and wrong where the idle server had written another text for that clip. The
long upload's memory is the server's resident memory, beside what ``longform`` predicts of it. Then clients that send
the long recording are killed (SIGKILL), each at another part of the time that it took: how long until the server has
ended the work and closed the upload. Prints a line for each of the three, and one JSON line last; the exit status is 1
where something is lost or wrong.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch

from cald_speech.benchmarks.stopwatch import resident
from cald_speech.conversion import from_pretrained
from cald_speech.data.audio import SAMPLE_RATE, read_audio
from cald_speech.errors import UserError, error_epilogue
from cald_speech.longform import predicted_peak_bytes
from cald_speech.shipped import model_folder

ADDRESS = "/v1/audio/transcriptions"
PATIENCE_S = 600
GIB = 2**30
PIECE = 2**16  # bytes sent at once
ENDINGS = {".flac", ".wav", ".ogg", ".mp3"}
SERVE = "from cald_speech.commands import main; main()"


@dataclass
class Server:
    """A server in a process of its own."""

    process: int
    port: int

    def busy(self) -> int:
        """Recordings that come in, wait or are read."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("GET", "/health")
        told = json.loads(connection.getresponse().read())
        connection.close()
        return told["running"] + told["waiting"]

    def uploads(self, folder: Path) -> int:
        """Files in this folder that the server has open."""
        names = []
        for number in Path(f"/proc/{self.process}/fd").iterdir():
            try:
                names.append(os.readlink(number))
            except FileNotFoundError:  # closed since
                continue
        return sum(name.startswith(str(folder)) for name in names)


@contextmanager
def served(model: str, clients: int, folder: Path) -> Iterator[Server]:
    """``model`` behind a free port of this machine; uploads go to ``folder``.

    Raises: UserError, with the server's last words, where it does not start.
    """
    command = [sys.executable, "-c", SERVE, "serve", model, "--port", "0", "--model_name", "served"]
    command += ["--max_queue", str(clients), "--upload_folder", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        said, url = [], None
        for line in process.stderr:
            said.append(line)
            if (url := re.search(r"^serving .* at http://127\.0\.0\.1:(\d+)/", line)) is not None:
                break
        if url is None:
            raise UserError(f"the server of {model} did not start: {''.join(said).strip()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Server(process.pid, int(url[1]))
    finally:
        process.terminate()
        process.wait()


def ask(port: int, path: str | Path, connection: HTTPConnection | None = None) -> tuple[int, str]:
    """The status of the answer to one upload, and its body; status 0 and the reason where none came."""
    own = connection or HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    disposition = "Content-Disposition: form-data; name="
    head = f'--part\r\n{disposition}"model"\r\n\r\nserved\r\n'
    head += f'--part\r\n{disposition}"file"; filename="a.wav"\r\n\r\n'
    tail = "\r\n--part--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=part"}
    headers["Content-Length"] = str(len(head) + Path(path).stat().st_size + len(tail))
    try:
        own.request("POST", ADDRESS, body=_pieces(head, Path(path), tail), headers=headers)
        answer = own.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, HTTPException) as error:
        own.close()
        return 0, f"{type(error).__name__}: {error}"
    finally:
        if connection is None:
            own.close()


def _pieces(head: str, path: Path, tail: str) -> Iterator[bytes]:
    yield head.encode()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece
    yield tail.encode()


def load(server: Server, clips: Sequence[Path], clients: int, seconds: float) -> dict[str, Any]:
    """So many clients for so long; client n begins with clip n, and goes through all in turn."""
    alone, took_alone = {}, []
    for clip in clips:
        start = time.monotonic()
        status, alone[clip] = ask(server.port, clip)
        took_alone.append(time.monotonic() - start)
        if status != 200:
            raise UserError(f"expected the idle server to read {clip.name}, got {status}: {alone[clip][:300]}")
    answers: list[tuple[float, int, bool]] = []
    begin = time.monotonic()

    def one(number: int) -> None:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        for clip in cycle([*clips[number % len(clips) :], *clips[: number % len(clips)]]):
            start = time.monotonic()
            if start >= begin + seconds:
                break
            status, text = ask(server.port, clip, connection)
            answers.append((time.monotonic() - start, status, text == alone[clip]))
        connection.close()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = [took for took, _, _ in answers]
    return {
        "clients": clients,
        "seconds": time.monotonic() - begin,
        "answers": len(answers),
        "lost": sum(status != 200 for _, status, _ in answers),
        "wrong": sum(status == 200 and not same for _, status, same in answers),
        "alone_s": median(took_alone),
        "median_s": median(times),
        "p99_s": float(np.percentile(times, 99)),
        "slowest_s": max(times),
    }


def long_upload(server: Server, path: Path, model: str, duration_s: float) -> dict[str, Any]:
    """Time and memory of one recording, beside the prediction of its memory."""
    predicted = predicted_peak_bytes(from_pretrained(model), duration_s)
    before = resident("VmRSS", process=server.process)
    Path(f"/proc/{server.process}/clear_refs").write_text("5")  # the peak counts from here on
    start = time.monotonic()
    status, text = ask(server.port, path)
    return {
        "duration_s": duration_s,
        "bytes": path.stat().st_size,
        "status": status,
        "seconds": time.monotonic() - start,
        "words": len(json.loads(text)["text"].split()) if status == 200 else 0,
        "before_bytes": before,
        "peak_bytes": resident("VmHWM", process=server.process),
        "after_bytes": resident("VmRSS", process=server.process),
        "predicted_bytes": predicted,
    }


def killed(server: Server, path: Path, folder: Path, took_s: float, times: int) -> list[dict[str, float]]:
    """For each of so many clients, when it was killed and how long the server kept its work."""
    found = []
    for number in range(times):
        client = multiprocessing.get_context("fork").Process(target=ask, args=(server.port, path))
        client.start()
        while not server.busy():
            time.sleep(0.02)
        at_s = (number + 0.5) / times * took_s
        time.sleep(at_s)
        was_busy = server.busy()
        start = time.monotonic()
        client.kill()
        while server.busy() or server.uploads(folder):
            time.sleep(0.01)
        found.append({"at_s": at_s, "busy_before": was_busy, "freed_after_s": time.monotonic() - start})
        client.join()
    return found


def recordings(places: Sequence[Path]) -> list[Path]:
    """All recordings at these places, by their names. Raises UserError where there is none."""
    found = []
    for place in places:
        inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in ENDINGS) if place.is_dir() else [place]
        found += inside
    if not found:
        raise UserError(
            f"expected recordings ({', '.join(sorted(ENDINGS))}) in {', '.join(map(str, places))}, got none"
        )
    return found


def join(sources: Sequence[Path], path: Path, duration_s: float) -> None:
    """A file of so many seconds: the recordings one after another, again and again."""
    left = round(duration_s * SAMPLE_RATE)
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, subtype="PCM_16") as file:
        for source in cycle(sources):
            samples = read_audio(source)[:left].numpy()
            file.write(samples)
            left -= len(samples)
            if left <= 0:
                return


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cald-speech benchmark serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=model_folder, help="folder or hub id")
    parser.add_argument("audio", type=Path, nargs="+", help="recordings, or folders of them")
    parser.add_argument("--clients", type=_at_least_one, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clips", type=_at_least_one, default=32, help="recordings that the clients send")
    parser.add_argument("--hours", type=float, default=1, help="of the long upload")
    parser.add_argument("--kills", type=_at_least_one, default=5)
    args = parser.parse_args(arguments)
    with error_epilogue(), tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as uploads:
        sources, folder = recordings(args.audio), Path(uploads).resolve()
        clips, hour = sources[: args.clips], Path(kept, "long.wav")
        clips_s = sum(soundfile.info(clip).duration for clip in clips) / len(clips)
        join(sources, hour, 3600 * args.hours)
        machine = f"{os.cpu_count()} cores, {platform.machine()}, OMP_NUM_THREADS={os.getenv('OMP_NUM_THREADS', '')}"
        print(f"{machine}; torch {torch.__version__}; {args.model}; {len(clips)} clips of {clips_s:.1f} s on average")
        with served(args.model, args.clients, folder) as server:
            under_load = load(server, clips, args.clients, args.seconds)
            print(
                "{clients} clients for {seconds:.1f} s: {answers} answers, {lost} lost, {wrong} wrong; alone "
                "{alone_s:.3f} s, median {median_s:.2f} s, 99th percentile {p99_s:.2f} s, slowest {slowest_s:.2f} s"
                "".format(**under_load),
                flush=True,
            )
            upload = long_upload(server, hour, args.model, 3600 * args.hours)
            sizes = {f"{name}_gib": upload[f"{name}_bytes"] / GIB for name in ("before", "peak", "after", "predicted")}
            print(
                "{duration_s:g} s in one upload of {bytes:,} B: status {status} after {seconds:.1f} s, {words} words, "
                "resident before {before_gib:.2f} GiB, peak {peak_gib:.2f} GiB, after {after_gib:.2f} GiB; predicted, "
                "weights included, {predicted_gib:.2f} GiB".format(**upload, **sizes),
                flush=True,
            )
            kills = killed(server, hour, folder, upload["seconds"], args.kills)
            freed = ", ".join(f"{kill['freed_after_s']:.2f}" for kill in kills)
            print(f"{len(kills)} clients killed in the midst of it: the work had ended after {freed} s", flush=True)
    found = {"machine": machine, "model": args.model, "clip_s": clips_s, "load": under_load, "long": upload}
    print(json.dumps(found | {"killed": kills}))
    return int(bool(under_load["lost"] or under_load["wrong"] or upload["status"] != 200))


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
