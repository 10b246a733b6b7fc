"""A line of the benchmark's table, as a result, as text and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cald_speech.benchmarks.ops_workloads import Case
from cald_speech.benchmarks.stopwatch import Timing

COLUMNS = ("op", "case", "dtype", "pass", "by", "median ms", "spread", "peak MiB", "of limit", "time over peers'")


@dataclass
class Row:
    """A line of the table; without a timing, ``status`` says why there is none."""

    case: Case
    name: str
    kind: str
    status: str = "ok"
    timing: Timing | None = None
    peak_bytes: int | None = None
    least_s: float | None = None
    bound: str = ""
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def of_limit(self) -> float | None:
        return self.least_s / self.timing.median_s if self.timing else None

    def as_json(self) -> dict[str, Any]:
        case = self.case
        named = {"op": case.op, "batch": case.batch, "num_frames": case.num_frames, "width": case.width}
        named |= {"groups": case.groups, "dtype": str(case.dtype).removeprefix("torch."), "direction": case.direction}
        named |= {"name": self.name, "kind": self.kind, "status": self.status}
        if self.timing is None:
            return named
        named |= {"median_s": self.timing.median_s, "spread_s": self.timing.spread_s}
        named |= {"repeats": len(self.timing.seconds), "peak_mib": self.peak_bytes and self.peak_bytes / 2**20}
        named |= {
            "least_s": self.least_s,
            "bound": self.bound,
            "of_limit": self.of_limit,
            "time_over": {k: round(v, 4) for k, v in self.ratios.items()},
        }
        return {key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in named.items()}


def size_of(case: Case) -> str:
    groups = f", {case.groups} group{'s' if case.groups > 1 else ''}" if "ssd" in case.op else ""
    return f"{case.batch} x {case.num_frames:,} x {case.width}{groups}"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; where there is no time, the reason stands at its end."""
    case, name = row.case, str(row.case.dtype).removeprefix("torch.")
    start = (case.op, size_of(case), name, case.direction, row.name)
    if row.timing is None:
        return (*start, "-", "-", "-", "-", row.status)
    ratios = ", ".join(f"{ratio:.2f} {peer}" for peer, ratio in row.ratios.items()) if row.kind == "backend" else ""
    peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    limit = f"{100 * row.of_limit:.0f} % {row.bound}"
    return (*start, f"{1e3 * row.timing.median_s:.3f}", f"{1e3 * row.timing.spread_s:.3f}", peak, limit, ratios)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side.

    Example
    -------
    >>> print(table([("op", "ms"), ("ssd", "1.5")]))
    op  | ms
    ssd | 1.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
