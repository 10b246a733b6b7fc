"""What a GPU is for, measured in one call: the pieces of cald_speech/benchmarks/gpu_pieces.py, most valuable first.

    python -m cald_speech.benchmarks.gpu_evidence --budget 360 --output_folder results/gpu_evidence

Each piece has a process of its own and what is left of the budget. One that fails or is stopped keeps the rows that it
had, and the next one runs; one for which too little is left is skipped. After each piece everything is written again to
evidence.json in the output folder. The exit status is 1 where something failed that is no question of memory or time.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers

from cald_speech.benchmarks.gpu_pieces import PIECES, SIZES, Row
from cald_speech.errors import UserError, error_epilogue
from cald_speech.files import whole_file

FILE = "evidence.json"
# Seconds under which a piece is not begun: what its first row takes, kernels compiled; and the most that it is given.
LEAST_S = {"parity": 20, "training step": 40, "length": 40, "day": 60, "language model": 40, "bars": 40}
LEAST_OF_OTHERS_S, MOST_S = 40, 150
GOOD_ENDS = ("ok", "skipped", "stopped")
Runner = Callable[[Mapping[str, str], float], tuple[str, list[Row]]]


def run_apart(case: Mapping[str, str], limit_s: float) -> tuple[str, list[Row]]:
    """How a piece ended and the rows that it gave, in a process of its own."""
    command = [sys.executable, "-m", "cald_speech.benchmarks.gpu_pieces", json.dumps(case)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        try:
            status = process.wait(limit_s)
            ended = "ok" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"stopped after {limit_s:.0f} s"
        out.seek(0)
        err.seek(0)
        said = err.read().strip()
        lines = out.read().splitlines()
    if ended.startswith("failed"):
        print(said, file=sys.stderr)
        ended += f": {said.splitlines()[-1][:300] if said else 'nothing was said'}"
    return ended, [row for row in map(as_row, lines) if row is not None]


def as_row(line: str) -> Row | None:
    """A row of JSON; None for what a library printed, and for a line that was cut off.

    Example
    -------
    >>> as_row('{"what": "reading"}'), as_row("Autotuning ..."), as_row('{"what": "rea')
    ({'what': 'reading'}, None, None)
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def collect(pieces: Sequence[str], case: Mapping[str, str], budget_s: float, folder: Path, run: Runner) -> Row:
    """Run the pieces within the budget and write what they give; returns all of it."""
    evidence: Row = {"machine": machine(case["device"]), "size": case["size"], "budget_s": budget_s, "pieces": []}
    start = time.monotonic()
    for name in pieces:
        begun = time.monotonic()
        left = budget_s - (begun - start)
        least_s = LEAST_S.get(name, LEAST_OF_OTHERS_S) if case["size"] == "full" else 0
        rows: list[Row] = []
        if left < least_s:
            ended = f"skipped: {max(0, left):.0f} s are left, and it is not begun with less than {least_s} s"
        else:
            ended, rows = run(dict(case) | {"piece": name}, min(left, MOST_S))
        piece = {"piece": name, "ended": ended, "seconds": time.monotonic() - begun, "rows": rows}
        print(told(piece), flush=True)
        evidence["pieces"].append(piece)
        with whole_file(folder / FILE) as unfinished:
            unfinished.write_text(json.dumps(evidence, indent=1) + "\n")
    return evidence


def machine(device: str) -> Row:
    """Where this ran. The device itself is asked by the pieces alone: whoever asks holds some of its memory."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            found["gpu"] = f"nvidia-smi: {error}"
    return found | {"processor": platform.machine(), "device": device}


def told(piece: Row) -> str:
    """A piece as lines of the log.

    Example
    -------
    >>> print(told({"piece": "day", "ended": "ok", "seconds": 1.2, "rows": [{"what": "reading", "seconds": 0.51234}]}))
    == day: ok, 1 s
    reading: seconds 0.5123
    """
    lines = [f"== {piece['piece']}: {piece['ended']}, {piece['seconds']:.0f} s"]
    for row in piece["rows"]:
        cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "what")
        lines.append(f"{row.get('what')}: {', '.join(cells)}")
    return "\n".join(lines)


def failed(evidence: Row) -> list[str]:
    """The pieces that went wrong, but for memory and time: those are figures.

    Example
    -------
    >>> failed({"pieces": [{"piece": "length", "ended": "ok", "rows": [{"fault": "out of memory"}]}]})
    []
    """
    wrong = []
    for piece in evidence["pieces"]:
        faults = [row for row in piece["rows"] if row.get("fault", "out of memory") != "out of memory"]
        if not piece["ended"].startswith(GOOD_ENDS) or faults or any(row.get("wrong") for row in piece["rows"]):
            wrong.append(piece["piece"])
    return wrong


def main(arguments: Sequence[str] | None = None, run: Runner = run_apart) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=360.0, help="seconds for all pieces together")
    parser.add_argument("--output_folder", type=Path, default=Path("results/gpu_evidence"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="full", choices=list(SIZES), help="tiny: a trial of the program alone")
    parser.add_argument("--pieces", nargs="+", choices=list(PIECES), default=list(PIECES), metavar="PIECE")
    options = parser.parse_args(arguments)
    with error_epilogue():
        if options.size == "full" and options.device == "cpu":
            raise UserError("--size full is for a GPU, and takes a CPU days: expected --size tiny with --device cpu")
        options.output_folder.mkdir(parents=True, exist_ok=True)
        case = {"device": options.device, "size": options.size}
        evidence = collect(options.pieces, case, options.budget, options.output_folder, run)
    wrong = failed(evidence)
    print(f"{options.output_folder / FILE}: {', '.join(wrong) + ' failed' if wrong else 'nothing failed'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
