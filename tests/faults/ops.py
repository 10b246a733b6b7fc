"""Random requests of every op: what a backend gives is what the recurrence gives, or the request is refused by name.

A case is sound (odd sizes, lengths, layouts, dtypes, padding full of NaN), or has a frame that is NaN, infinite or too
large for what is made of it, or asks for what cannot be. Kernels can end their process, or never return to it: so cases
run in a child, which lives until one does.

``python -m tests.faults.ops`` is that child. It says ``ready``, reads lines such as ``native 5``, a backend and a seed,
and answers each with a line of JSON.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once

import pytest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cald_speech.errors import UserError
from cald_speech.ops import OPS
from tests.helpers import TOLERANCE
from tests.ops.cases import CARRYING, STEPS, Way, bits_differ, exact, is_framewise, like_output, make_inputs

BACKENDS = ("naive", "torch", "native", "triton")
SCAN = ("head_dim", "d_state")
# A line for each op: what its groups share, and its other sizes, as make_inputs() of tests/ops/cases.py calls them.
SIZED: dict[str, tuple[str, tuple[str, ...]]] = {
    "ssd": ("heads", SCAN),
    "ssd_bidirectional": ("heads", SCAN),
    "ssd_pair": ("heads", SCAN),
    "selective_scan": ("channels", ("d_state",)),
    "gated_delta": ("heads", (*SCAN, "per_channel")),
    "short_conv": ("channels", ("taps",)),
}
OPTIONAL = ("D", "bias", "initial_state")
SMALL = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17)
NUMBERS = {
    "batch": (0, 1, 2, 2, 3, 3, 4),
    "frames": (0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 100, 130),
    "groups": (1, 1, 1, 2, 3),
    "a group": (0, 1, 1, 2, 3, 5, 17, 35, 64),
    "head_dim": (*SMALL, 31, 48, 64, 67, 80, 130),
    "d_state": (*SMALL, 31, 48, 64, 70, 128, 129, 257),
    "per_channel": (False, True),
    "taps": (1, 2, 3, 4, 4, 4, 5, 16, 17, 18),
    "chunk_size": (1, 2, 7, 16, 17, 64, 300, 2**40),
}
# The interpreter takes milliseconds for every program.
INTERPRETED = {
    "batch": (0, 1, 2, 2),
    "frames": (0, 1, 2, 3, 5, 9, 16, 17, 18, 33),
    "groups": (1, 1, 2),
    "a group": (0, 1, 1, 2),
    "head_dim": (*SMALL, 48, 67),
    "d_state": (*SMALL, 70, 129, 257),
    "taps": (1, 2, 3, 4, 4, 5, 17),
    "chunk_size": (7, 16, 64, 2**40),
}
MOST_NUMBERS = 2**16  # of x, and of all states
MOST_STEPS = 2**21  # of such numbers, frame by frame
HALF = (torch.float16, torch.bfloat16)
# Those that a backend takes more often than those that it refuses.
DTYPES = {
    "naive": (torch.float32,) * 4 + (torch.float64, *HALF),
    "torch": (torch.float32,) * 4 + (torch.float64, *HALF),
    "native": (torch.float32,) * 30 + (torch.float64, *HALF),
    "triton": (torch.float32,) * 18 + (torch.float16,) * 9 + (torch.float64, *HALF),
}
TOLERANCES = {torch.float64: 1e-9, torch.float32: TOLERANCE["parity"]}
# Twice what the contract allows at its sizes: two scans that nearly cancel, or one number that is rounded three times.
TOLERANCES |= {dtype: 2 * TOLERANCE[str(dtype).removeprefix("torch.")] for dtype in HALF}
# What an error is relative to is at least so much of the largest gradient: sums over frames cancel in some.
LEAST_GRADIENT = 1e-2
BAD = (torch.nan, torch.inf, -torch.inf)
TOO_LARGE = (1e30, 3e38)


@dataclass(frozen=True)
class Case:
    way: Way
    inputs: dict[str, Tensor]
    lengths: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)
    threads: int = 1

    def __str__(self) -> str:
        tensors = {name: f"{v.dtype} {tuple(v.shape)} {v.stride()}" for name, v in self.inputs.items()}
        lengths = None if self.lengths is None else f"{self.lengths.dtype} {self.lengths.tolist()}"
        return f"{self.way}, {tensors}, lengths {lengths}, {self.options}"

    @property
    def num_frames(self) -> int:
        return next(iter(self.inputs.values())).size(1)

    @property
    def padding(self) -> Tensor:
        """(B, T)"""
        batch = next(iter(self.inputs.values())).size(0)
        lengths = torch.full((batch,), self.num_frames) if self.lengths is None else self.lengths
        return torch.arange(self.num_frames) >= lengths[:, None]

    def run(self, inputs: dict[str, Tensor] | None = None, **options: Any) -> dict[str, Tensor]:
        with self.on_its_threads():
            return self.way.run(self.inputs if inputs is None else inputs, self.lengths, **self.options, **options)

    def call(self, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        inputs = {n: v.to(self.way.device) for n, v in (self.inputs if inputs is None else inputs).items()}
        with self.on_its_threads():
            return {n: v.detach().cpu() for n, v in self.way.call(inputs, self.lengths, **self.options).items()}

    @contextlib.contextmanager
    def on_its_threads(self) -> Iterator[None]:
        """It alone: the recurrence's small steps would wait for one another."""
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)


# --- a case is drawn --------------------------------------------------------------------------------------------------


def draw(backend: str, rng: random.Random) -> Case:
    op = rng.choice([op for op in SIZED if backend in OPS[op]])
    way, (unit, others) = Way(op, backend, rng.choice(["by blocks", "whole batch"])), SIZED[op]
    numbers = NUMBERS | (INTERPRETED if way.backend == "triton" else {})
    while True:
        sizes = {name: rng.choice(numbers[name]) for name in ("batch", "groups", *others)}
        sizes[unit] = sizes["groups"] * rng.choice(numbers["a group"])
        num_frames = rng.choice(numbers["frames"])
        per_frame = sizes["batch"] * sizes[unit] * sizes.get("head_dim", 1)
        few_zeros = [size for size in (*sizes.values(), num_frames) if size is not False].count(0) <= rng.choice(
            [0, 0, 0, 1, 1, 6]
        )
        state = per_frame * sizes.get("d_state", 1)
        if few_zeros and max(per_frame * num_frames, state) <= MOST_NUMBERS and state * num_frames <= MOST_STEPS:
            break
    left_out = tuple(name for name in OPTIONAL if rng.random() < 0.3)
    strength = rng.choice([None] * 6 + [1e-6, 1.0, 50.0])
    seed = rng.getrandbits(32)
    inputs = make_inputs(op, num_frames, **sizes, left_out=left_out, strength=strength, seed=seed)
    dtype = rng.choice(DTYPES[backend])
    parameters = rng.choice([dtype, torch.float32])
    inputs = {
        name: laid_out(v.to(dtype if is_framewise(name) and name.split()[0] not in STEPS else parameters), rng)
        for name, v in inputs.items()
    }
    if rng.random() < 0.1:
        inputs = {name: v.to(rng.choice(DTYPES[backend])) for name, v in inputs.items()}
        if op == "ssd_pair":
            inputs |= {n: v.to(inputs[n.replace("future", "past")].dtype) for n, v in inputs.items()}
    options = {"reverse": rng.random() < 0.5} if op in CARRYING else {}
    if op == "short_conv":
        options["activation"] = rng.choice(["silu", "identity"])
    elif rng.random() < 0.5:
        options["chunk_size"] = rng.choice(numbers["chunk_size"])
    threads = rng.choice([1, 1, 2, 3]) if backend == "native" else 1
    return Case(way, inputs, draw_lengths(sizes["batch"], num_frames, rng), options, threads)


def draw_lengths(batch: int, num_frames: int, rng: random.Random) -> Tensor | None:
    kind = rng.random()
    if kind < 0.25:
        return None
    ends = [0, 1, num_frames - 1, num_frames, num_frames // 2, rng.randint(0, num_frames)]
    lengths = [min(max(rng.choice(ends), 0), num_frames) for _ in range(batch)]
    kinds = [torch.int64, torch.int64, torch.int32, torch.int16]
    return torch.tensor([num_frames] * batch if kind < 0.35 else lengths, dtype=rng.choice(kinds))


def laid_out(v: Tensor, rng: random.Random) -> Tensor:
    """The same numbers, now and then lying elsewhere: among NaN, in another order, or all in one place."""
    kind = rng.random()
    if kind < 0.6 or not v.dim():
        return v
    if kind < 0.8:
        wide = torch.full((*v.shape[:-1], v.size(-1) + 3), torch.nan, dtype=v.dtype)
        wide[..., 2:-1] = v
        return wide[..., 2:-1]
    if kind < 0.85:
        return torch._neg_view(-v)
    if kind < 0.95:
        order = rng.sample(range(v.dim()), v.dim())
        return v.permute(order).contiguous().permute([order.index(axis) for axis in range(v.dim())])
    axis = rng.randrange(v.dim())
    return v.narrow(axis, 0, 1).expand(v.shape) if v.size(axis) else v


# --- and looked at ----------------------------------------------------------------------------------------------------


def sound(case: Case, rng: random.Random) -> None:
    """Outputs, states and gradients are the recurrence's, whatever stands in the padding."""
    inputs, poisoned = case.inputs, None
    if case.lengths is not None and rng.random() < 0.5:
        poisoned = case.padding
        inputs = {name: v.clone() for name, v in inputs.items()}
        for name in filter(is_framewise, inputs):
            inputs[name][poisoned] = rng.choice(BAD)
    actual = case.run(inputs, poisoned=poisoned)
    options = {name: v for name, v in case.options.items() if name != "chunk_size"}
    expected = exact(case.way.op, case.inputs, case.lengths, **options)
    kinds = {name: expected_dtype(name, case) for name in expected}
    assert {name: v.dtype for name, v in actual.items()} == kinds
    assert_near(actual, expected, max(TOLERANCES[v.dtype] for v in case.inputs.values()))
    if poisoned is not None:
        assert not any(v[poisoned].any() for n, v in actual.items() if n.startswith("y"))
    if rng.random() < 0.3:
        with torch.no_grad():
            alone = case.call()
        assert bits_differ(alone, {name: actual[name] for name in alone}) == []


def expected_dtype(name: str, case: Case) -> torch.dtype:
    if name.startswith("gradient of "):
        return case.inputs[name.removeprefix("gradient of ")].dtype
    dtype = case.inputs[name.replace("state", "y").replace("y", like_output(case.way.op))].dtype
    return torch.promote_types(dtype, torch.float32) if name == "state" and case.way.op != "short_conv" else dtype


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    sizes = {name: v.abs().max().item() if v.numel() else 0.0 for name, v in expected.items()}
    least = LEAST_GRADIENT * max(size for name, size in sizes.items() if name.startswith("gradient"))
    for name, v in expected.items():
        assert actual[name].shape == v.shape, name
        scale = max(sizes[name], least if name.startswith("gradient") else 0.0, 1e-12)
        error = (actual[name].double() - v).abs().max().item() / scale if v.numel() else 0.0
        assert error <= tolerance, f"{name}: off by {error:.1e} of {scale:.1e}"


def bad_frame(case: Case, rng: random.Random) -> None:
    """It changes no other sequence to the bit, gradients included, and no frame before it; what it spoils is seen."""
    places = (~case.padding).nonzero().tolist()
    if not places:
        return
    sequence, frame = rng.choice(places)
    names = [name for name in case.inputs if is_framewise(name) and case.inputs[name][sequence, frame].numel()]
    chosen, values = rng.sample(names, rng.randint(min(1, len(names)), len(names))), rng.choice([BAD, TOO_LARGE])
    sound = case.inputs | {name: case.inputs[name].clone() for name in chosen}  # a copy may lie in another order
    spoilt = sound | {name: sound[name].clone() for name in chosen}
    for name in chosen:
        at = spoilt[name][sequence, frame]
        at[tuple(rng.randrange(size) for size in at.shape)] = rng.choice(values)
    run = case.call if case.way.backend == "triton" and rng.random() < 0.7 else case.run
    actual, clean = run(spoilt), run(sound)
    others = [b for b in range(len(case.padding)) if b != sequence]
    for name, v in clean.items():
        if name == "state" or is_framewise(name.removeprefix("gradient of ")) or name[0] == "y":
            assert torch.equal(actual[name][others], v[others]), f"{name} of another sequence than {sequence}"
    for name in (name for name in clean if name[0] == "y" and case.way.op != "ssd_bidirectional"):
        after = case.options.get("reverse") or name == "y future"
        before = slice(frame + 1, None) if after else slice(0, frame)
        where = f"{name} of sequence {sequence} before frame {frame}, {chosen}"
        assert torch.equal(actual[name][sequence, before], clean[name][sequence, before]), where
    if values is BAD:
        naive = Case(Way(case.way.op, "naive"), case.inputs, case.lengths, case.options).call(spoilt)
        for name, v in naive.items():
            assert torch.equal(actual[name].isfinite(), v.isfinite()), f"{name}: bad in other places, {chosen}"


def bad_request(case: Case, rng: random.Random) -> None:
    """One argument is another: refused by name, unless the recurrence takes it too."""
    inputs: dict[str, Any] = dict(case.inputs)
    options: dict[str, Any] = {**case.options, "lengths": case.lengths, "backend": case.way.backend}
    kind, mode = rng.random(), contextlib.nullcontext()
    if kind < 0.6:
        name = rng.choice(list(inputs))
        names = [name] if rng.random() < 0.5 else [n for n in inputs if n.split()[0] == name.split()[0]]
        change = rng.choice(CHANGES)
        inputs |= {name: change(inputs[name], random.Random(name[0])) for name in names}
        said = names
    elif kind < 0.7:
        mode = rng.choice([contextlib.nullcontext(), FakeTensorMode()])
        there: Callable = getattr(mode, "from_tensor", lambda v: v.to("meta"))
        inputs = {name: there(v) for name, v in inputs.items()}
        options["lengths"] = None if case.lengths is None else there(case.lengths)
        said = ["meta or fake"]
    else:
        name = rng.choice([n for n in OTHER if n in options or (n == "chunk_size" and case.way.op != "short_conv")])
        options[name] = rng.choice(OTHER[name])(case)
        said = [name, options[name]]
    try:
        with mode:
            found = outcome(case.way, inputs, options)
            expected = outcome(case.way, inputs, options | {"backend": "naive"})
        assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}
        assert options["backend"] in BACKENDS, "no such backend, and not refused"
    except UserError as error:
        if not str(error).startswith("backend: "):
            with pytest.raises(UserError):
                outcome(case.way, inputs, options | {"backend": "naive"})
        raise
    except Exception as error:
        error.add_note(f"changed: {said}")
        raise


def nothing_there(case: Case, rng: random.Random) -> None:
    """No heads, channels, features or states: refused."""
    outcome(case.way, case.inputs, {**case.options, "lengths": case.lengths, "backend": case.way.backend})
    raise AssertionError("nothing is there, and not refused")


def outcome(way: Way, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """What the op returns; UserError for a ValueError that names an argument."""
    try:
        backend = options["backend"]
        return Way(way.op, backend).call(inputs, **{k: v for k, v in options.items() if k != "backend"})
    except ValueError as error:
        if not re.match(r"(dt, )?\w+: .", str(error)):
            raise
        raise UserError(str(error)) from error


def axis_of(v: Tensor, rng: random.Random) -> int:
    return rng.randrange(max(v.dim(), 1))


CHANGES: list[Callable[[Tensor, random.Random], Any]] = [
    lambda v, rng: v[..., :-1],
    lambda v, rng: v[:, 1:] if v.dim() > 1 else v[1:],
    lambda v, rng: v[:0],
    lambda v, rng: torch.cat([v, v], dim=axis_of(v, rng)),
    lambda v, rng: v.unsqueeze(axis_of(v, rng)),
    lambda v, rng: v.select(axis_of(v, rng), 0) if v.numel() else v[0:0],
    lambda v, rng: v.transpose(0, -1),
    lambda v, rng: v.sum(),
    lambda v, rng: v.long(),
    lambda v, rng: v > 0,
    lambda v, rng: v.to(torch.complex64),
    lambda v, rng: v.to(torch.float8_e4m3fn),
    lambda v, rng: v.to("meta"),
    lambda v, rng: FakeTensorMode().from_tensor(v),
    lambda v, rng: v.to_sparse(),
    lambda v, rng: v.float().resolve_neg().numpy(),
    lambda v, rng: v.tolist(),
    lambda v, rng: None,
    lambda v, rng: 1.0,
    lambda v, rng: torch.nn.Parameter(v),
]
OTHER: dict[str, list[Callable[[Case], Any]]] = {
    "lengths": [
        lambda case: [1] * len(case.padding),
        lambda case: torch.ones(len(case.padding)),
        lambda case: torch.ones(len(case.padding), dtype=torch.bool),
        lambda case: torch.ones(len(case.padding) + 1, dtype=torch.long),
        lambda case: torch.ones(1, len(case.padding), dtype=torch.long),
        lambda case: torch.full((len(case.padding),), case.num_frames + 1),
        lambda case: torch.full((len(case.padding),), 2**62),
        lambda case: torch.full((len(case.padding),), -1),
        lambda case: torch.full((len(case.padding),), -(2**63)),
        lambda case: torch.zeros(len(case.padding), dtype=torch.long, device="meta"),
        lambda case: torch.tensor(1),
        lambda case: 3,
    ],
    "chunk_size": [lambda case, v=v: v for v in (0, -1, -1000, -(2**63), 1.5, "16", [], 2**70, True)],
    "backend": [lambda case, v=v: v for v in ("cuda", "", None, 3, [], "mamba_ssm")],
    "activation": [lambda case, v=v: v for v in ("relu", None, 3, [])],
}
KINDS = [sound] * 6 + [bad_frame] * 2 + [bad_request] * 2


def case_of(backend: str, rng: random.Random, folder: Path) -> None:
    """One case, in this process."""
    # Here: the kernels are imported when they are first chosen.
    from tests.ops.conftest import set_small_blocks

    case, kind = draw(backend, rng), rng.choice(KINDS)
    if any(0 in v.shape[2:] for name, v in case.inputs.items() if is_framewise(name)):
        kind = nothing_there
    with pytest.MonkeyPatch.context() as monkeypatch:
        if backend == "triton" or rng.random() < 0.5:
            set_small_blocks(case.way, monkeypatch)
        try:
            kind(case, rng)
        except ValueError as error:
            if kind is bad_request or not str(error).startswith(f"backend: {case.way.op} cannot run with "):
                error.add_note(f"{kind.__name__}: {case}")
                raise
            raise UserError(str(error)) from error
        except Exception as error:
            error.add_note(f"{kind.__name__}: {case}")
            raise


# --- in a child -------------------------------------------------------------------------------------------------------


LIMIT_S = 120  # for one case, most of which take 0.05 s: the interpreter is slow on a machine that has much to do


class Child:
    """The process that runs cases: started when there is none, and again when it has ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def run(self, backend: str, seed: int) -> None:
        """Raise what the case has raised; RuntimeError where it has ended the process, which ends if nobody waits."""
        try:
            if self.process is None:
                signal.alarm(0)  # what it imports is not the case's time
                command = [sys.executable, "-m", __name__]
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                self.process.stdout.readline()
            signal.alarm(LIMIT_S)
            answer = self.ask(f"{backend} {seed}\n")
        except BaseException:
            self.end()
            raise
        if answer is None:
            raise RuntimeError(f"{backend} {seed} ended its process: {self.end()}")
        if answer["outcome"] == "refused":
            raise UserError(answer["said"])
        if answer["outcome"] != "used":
            raise RuntimeError(f"{backend} {seed}: {answer['said']}")

    def ask(self, line: str) -> dict | None:
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(answer) if answer else None

    def end(self) -> int:
        """Its exit status: what it has ended with, if it has."""
        process, self.process = self.process, None
        try:
            status = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        process.stdin.close()
        process.stdout.close()
        return status


CHILD = Child()


def in_child(backend: str, rng: random.Random, folder: Path) -> None:
    CHILD.run(backend, rng.getrandbits(48))


GENERATORS = {f"ops by {backend}": partial(in_child, backend) for backend in BACKENDS}


def main(lines: Iterable[str]) -> NoReturn:
    from tests import faults

    faults.LIMIT_S = LIMIT_S
    print("ready", flush=True)
    for line in lines:
        backend, seed = line.split()
        outcome, said = faults.run(partial(case_of, backend), f"{backend} {seed}")
        print(json.dumps({"backend": backend, "seed": seed, "outcome": outcome, "said": said}), flush=True)
    raise SystemExit(0)


if __name__ == "__main__":
    main(sys.stdin)
