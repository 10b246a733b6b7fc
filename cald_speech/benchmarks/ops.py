"""``cald-speech benchmark ops``: how fast every backend of every op is, beside peers and the device's limit.

It explains itself, prints a table and, last, one line of JSON. ``--bars`` prints the project's own bars instead.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from cald_speech.benchmarks.bars import print_bars
from cald_speech.benchmarks.cases import HEAD_DIM, OPS, SIZES, Case
from cald_speech.benchmarks.contest import COLUMNS, NAIVE_FRAMES, cells, run_case, size_of, table
from cald_speech.benchmarks.stopwatch import Limits, measure_limits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What runs without arguments: under five minutes on two CPU cores, under three on a Hopper GPU.
DEFAULTS = {
    "cpu": {"sizes": "4x1500,10s,1min", "widths": "768", "dtypes": "float32", "seconds": 1.5},
    "cuda": {"sizes": "4x1500,8x3000,10s,1min,10min,1h", "widths": "768,1024", "dtypes": "bfloat16", "seconds": 0.3},
}
ISSUE_SIZE = "4x1500"  # measured with one group and with a group for each head
EXPLANATION = """\
What is measured: the median of repetitions in turns (one of each, then the next round), and their interquartile range.
"forward" is without gradients; "forward+backward" with those of every input. Peak memory is what a call holds at most
beyond its inputs: {memory}.
The limit is the longer of two lower bounds: bytes (each input read once, each output written once; a backward pass
reads the inputs again) over the bandwidth of a copy, and operations (of the recurrence, the fewest) over the rate of a
square matrix product, both measured now, on this device: {limits}.
Before a backend is timed it is compared with the recurrence in float64, with lengths and in both directions, outputs
and gradients; where that fails no time is printed. The recurrence itself is timed up to {naive:,} frames, or where
--backends names it; of a peer's chunk sizes only those near its best are repeated. The last column is the time over
each peer's: below 1 is faster."""
MEMORY = {"cpu": "resident, in a process of its own", "cuda": "as the allocator counts it"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.bars:
        print_bars(options.device, options.ops, dry_run=options.dry_run)
        return 0
    limits = measure_limits(options.device, [DTYPES[name] for name in options.dtypes])
    print(header(options.device))
    memory = MEMORY[torch.device(options.device).type]
    print(EXPLANATION.format(memory=memory, limits=told(limits), naive=NAIVE_FRAMES), flush=True)
    rows, wanted, end = [], list(cases(options)), time.monotonic() + options.budget
    for number, case in enumerate(wanted):
        if time.monotonic() > end:
            print(f"stopped after {options.budget:g} s: {number} of {len(wanted)} cases measured")
            break
        limit = {"seconds": options.seconds, "longest_s": options.longest}
        rows += run_case(case, limits, **limit, backends=options.backends, peers=options.peers)
        print(f"  {case.op} {size_of(case)} {case.direction}", file=sys.stderr, flush=True)
    print(table([COLUMNS, *map(cells, rows)]))
    print(
        json.dumps({"device": header(options.device), "limits": told(limits), "rows": [row.as_json() for row in rows]})
    )
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cald-speech benchmark ops", description=__doc__)
    listed = lambda text: tuple(part for part in text.split(",") if part)  # noqa: E731
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", type=listed, default=tuple(OPS), help="of " + ", ".join(OPS))
    parser.add_argument("--sizes", type=listed, help=f"of {', '.join(SIZES)}, or batch x frames, such as 4x1500")
    parser.add_argument("--widths", type=listed, help=f"multiples of {HEAD_DIM}")
    parser.add_argument("--groups", type=listed, help="numbers of groups, or 'heads': one for each head")
    parser.add_argument("--dtypes", type=listed, help="of " + ", ".join(DTYPES))
    parser.add_argument(
        "--directions", type=listed, default=("forward", "backward"), help="forward, backward (with it)"
    )
    parser.add_argument("--backends", type=listed, default=(), help="these of ours alone")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="compare with others")
    parser.add_argument("--seconds", type=float, help="of timing for a case, all contestants together")
    parser.add_argument("--longest", type=float, default=5.0, help="seconds of a call, beyond which it is left out")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--bars", action="store_true", help="the project's bars for --ops, each held or not")
    parser.add_argument("--dry-run", action="store_true", help="with --bars and a CPU: a GPU's bars at tiny sizes")
    parser.add_argument("--must-show", "--must_show", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.must_show:
        parser.error("--must-show is called --bars now")
    kind = torch.device(options.device).type
    if kind not in DEFAULTS:
        parser.error(f"--device: expected cpu or cuda, got {options.device}")
    for name, default in DEFAULTS[kind].items():
        if getattr(options, name) is None:
            setattr(options, name, listed(default) if isinstance(default, str) else default)
    for name, known in {"ops": OPS, "dtypes": DTYPES, "directions": ("forward", "backward")}.items():
        if unknown := [one for one in getattr(options, name) if one not in known]:
            parser.error(f"--{name}: expected of {', '.join(known)}, got {', '.join(unknown)}")
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every case that the options ask for, in the order of the table."""
    for op in options.ops:
        for size in options.sizes:
            batch, num_frames = SIZES[size] if size in SIZES else map(int, size.split("x"))
            for width in options.widths:
                heads = int(width) // HEAD_DIM
                for groups in options.groups or usual_groups(op, size):
                    for dtype in options.dtypes:
                        for direction in options.directions:
                            yield Case(
                                op,
                                batch=batch,
                                num_frames=num_frames,
                                heads=heads,
                                groups=heads if groups == "heads" else int(groups),
                                dtype=DTYPES[dtype],
                                device=options.device,
                                backward=direction == "backward",
                                d_state=OPS[op].d_state,
                            )


def usual_groups(op: str, size: str) -> tuple[str, ...]:
    """Attention's heads have keys of their own, and so have ours that start from it; Mamba-2's paper has one group."""
    if op.startswith("gated_delta"):
        return ("heads",)
    return ("1", "heads") if size == ISSUE_SIZE and "ssd" in op else ("1",)


def header(device: str) -> str:
    """The device's name, and what ran on it."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else f"{platform.machine()} CPU"
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def told(limits: Limits) -> str:
    rates = (
        f"{str(dtype).removeprefix('torch.')} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in limits.matmul_per_s.items()
    )
    return ", ".join((f"{limits.copy_bytes_per_s / 1e9:.1f} GB/s", *rates))


if __name__ == "__main__":
    sys.exit(main())
