"""``python -m tests.faults --minutes 30``: every generator in turn, and a table of what became of its cases.

``--kinds`` chooses by module (audio, experiments, folders, kills, manifests), ``--only`` by generator.
"""

import argparse
import resource
import sys
import time
from collections import Counter

from tests.faults import generators, kills, kinds, run

MOST_BYTES = 32 * 2**30  # of address space: what takes more fails, and is counted


def main() -> int:
    known = generators()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, help="so many of each, however long it takes, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="the first case's; the others follow")
    parser.add_argument("--kinds", choices=sorted(kinds()), action="append", help="may be repeated")
    parser.add_argument("--only", choices=sorted(known), action="append", help="may be repeated")
    parser.add_argument("--show", type=int, default=3, help="so many faults of each kind in full")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    chosen = [*(args.only or ()), *(name for kind in args.kinds or () for name in kinds()[kind])]
    counts = {name: Counter() for name in chosen or known}
    start, seed = time.monotonic(), args.seed
    end = start + 60 * args.minutes
    while time.monotonic() < end if args.cases is None else seed < args.seed + args.cases:
        for name, count in counts.items():
            outcome, said = run(known[name], f"{name} {seed}")
            count[outcome] += 1
            if outcome in ("traceback", "hang") and count[outcome] <= args.show:
                print(f"{name}, seed {seed}: {outcome}\n{said}", flush=True)
        seed += 1
        print(f"{seed - args.seed} of each, {(time.monotonic() - start) / 60:.1f} minutes", end="\r", file=sys.stderr)
    print("| damaged | cases | could be used | refused | tracebacks | hangs |\n|---|---|---|---|---|---|")
    for name, c in counts.items():
        print(f"| {name} | {c.total():,} | {c['used']:,} | {c['refused']:,} | {c['traceback']:,} | {c['hang']:,} |")
    if kills.done:
        print("Kills: " + ", ".join(f"{count} of {name}" for name, count in sorted(kills.done.items())))
    return int(any(c["traceback"] + c["hang"] for c in counts.values()))


if __name__ == "__main__":
    raise SystemExit(main())
