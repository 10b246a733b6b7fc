"""The project's own bars for the ops, each with its figure: held or not. Ratios of repetitions in turns, in one run."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from cald_speech.benchmarks.cases import OPS, Case, make_inputs, step
from cald_speech.benchmarks.contest import Row, run_case
from cald_speech.benchmarks.stopwatch import Limits, measure_in_turns, measure_limits, seconds_of
from cald_speech.mixers import Bidirectional
from cald_speech.mixers.normalised_linear_attention import FeatureScan
from cald_speech.ops import ssd
from cald_speech.ops.backends import choose_backend

TEN_MINUTES, HOUR = 30_000, 180_000
CPU_CASE = Case("ssd", batch=4, num_frames=1_500, heads=12, groups=1)
# Groups, and the bars of forward and of forward + backward.
CPU_BARS = ((1, 0.35, 0.5), (CPU_CASE.heads, 0.5, 0.65))
DELTA_CASE = Case("gated_delta", batch=4, num_frames=1_500, heads=12, groups=12)
DELTA_BARS, PER_CHANNEL_BAR = (0.3, 0.4), 1.5  # forward, forward + backward; either, over one decay a head
GPU_CASE = Case("ssd_bidirectional", 8, 3_000, heads=16, groups=1, dtype=torch.bfloat16, device="cuda", backward=True)
WIDTH, HEADS = 768, 12
GPU_DELTA_CASE = replace(GPU_CASE, op="gated_delta", groups=16)
GPU_CASES = {case.op: case for case in (GPU_CASE, GPU_DELTA_CASE)}
OVER_TORCH = 0.5  # of the gated delta rule's kernels: slower than that, they are not worth their lines
RUN_SECONDS = 8.0


@dataclass(frozen=True)
class Bar:
    """A figure and where it has to be; ``figure`` None says that it could not be had, for ``reason``.

    Example
    -------
    >>> print(Bar("forward over transformers'", 0.25, 0.35))
    held      0.250 (at most 0.35)  forward over transformers'
    """

    what: str
    figure: float | None
    limit: float
    at_most: bool = True
    reason: str = ""

    @property
    def held(self) -> bool:
        return self.figure is not None and (self.figure <= self.limit if self.at_most else self.figure >= self.limit)

    def __str__(self) -> str:
        figure = self.reason if self.figure is None else f"{self.figure:.3f}"
        side = "at most" if self.at_most else "at least"
        return f"{'held' if self.held else 'NOT HELD':9} {figure} ({side} {self.limit:g})  {self.what}"


def print_bars(device: str, ops: Sequence[str] = tuple(OPS), *, dry_run: bool = False) -> list[Bar]:
    """Print every bar of these ops on this kind of device as it is measured and, last, all as one line of JSON.

    ``dry_run`` takes a GPU's bars on a CPU, at tiny sizes.
    """
    bars = []
    on_gpu = torch.device(device).type == "cuda" or dry_run
    for bar in gpu_bars(ops, device) if on_gpu else cpu_bars(ops):
        print(bar, flush=True)
        bars.append(bar)
    print(json.dumps([asdict(bar) | {"held": bar.held} for bar in bars]))
    return bars


def cpu_bars(ops: Sequence[str]) -> Iterator[Bar]:
    limits = measure_limits("cpu", [torch.float32])
    if DELTA_CASE.op in ops:
        for case, bar in zip((DELTA_CASE, replace(DELTA_CASE, backward=True)), DELTA_BARS, strict=True):
            yield from against_transformers(case, limits, bar)
            yield per_channel(case)
    if CPU_CASE.op not in ops:
        return
    for groups, forward, both in CPU_BARS:
        for case, bar in ((CPU_CASE, forward), (replace(CPU_CASE, backward=True), both)):
            yield from against_transformers(replace(case, groups=groups), limits, bar)
    yield linearity(TEN_MINUTES, HOUR)
    yield normalised_scan()
    yield layer_inference(TEN_MINUTES)
    yield layer_training(TEN_MINUTES)


def gpu_bars(ops: Sequence[str] = tuple(OPS), device: str = "cuda") -> Iterator[Bar]:
    """On a CPU the cases are tiny, and their figures say nothing: a trial of what a GPU's time is too dear to try."""
    tiny = {"batch": 1, "num_frames": 40, "heads": 1, "groups": 1, "dtype": torch.float32, "device": "cpu"}
    sized = (lambda case: case) if device == "cuda" else (lambda case: replace(case, **tiny))
    limits = measure_limits(device, [sized(GPU_CASE).dtype])
    if GPU_CASE.op in ops:
        for case in (GPU_CASE, replace(GPU_CASE, batch=1, num_frames=HOUR)):
            yield from against_mamba_ssm(sized(case), limits)
        yield Bar("seconds of the first forward + backward, nothing compiled yet", first_call_s(sized(GPU_CASE)), 20)
    if GPU_DELTA_CASE.op not in ops:
        return
    for op in ("gated_delta", "gated_delta_per_channel"):
        for backward in (False, True):
            yield from over_torch(sized(replace(GPU_DELTA_CASE, op=op, backward=backward)), limits)
    what = "seconds of the gated delta rule's first forward + backward, nothing compiled yet"
    yield Bar(what, first_call_s(sized(GPU_DELTA_CASE)), 20)


def against_mamba_ssm(case: Case, limits: Limits) -> Iterator[Bar]:
    ours, others = ours_and_peers(run_case(case, limits, seconds=3.0))
    what = f"both directions, {case.batch} x {case.num_frames:,} x {case.width}, forward + backward"
    theirs = next((row for row in others if row.name == "mamba-ssm"), None)
    if theirs is None or theirs.timing is None or ours.timing is None:
        reason = "mamba-ssm is not here" if theirs is None else f"{ours.status}, mamba-ssm: {theirs.status}"
        yield Bar(f"{what}, over two passes of mamba-ssm", None, 1 / 1.5, reason=reason)
    else:
        yield Bar(f"{what}, over two passes of mamba-ssm", ours.ratios[theirs.name], 1 / 1.5)
    yield Bar(f"{what}, of the limit", ours.of_limit, 0.5, at_most=False, reason=ours.status)


def over_torch(case: Case, limits: Limits) -> Iterator[Bar]:
    """The backend that ``auto`` takes over the one made of torch's own matrix products, by their medians."""
    rows = run_case(case, limits, seconds=1.5, peers=False)
    ours, _ = ours_and_peers(rows)
    theirs = next(row for row in rows if row.name == "torch")
    what = f"{case.op}, {case.direction}, {case.batch} x {case.num_frames:,} x {case.width}"
    timed = ours.timing is not None and theirs.timing is not None
    ratio = ours.timing.ratio_to(theirs.timing) if timed else None
    yield Bar(f"{what}, over torch", ratio, OVER_TORCH, reason=f"{ours.status}, torch: {theirs.status}")


def against_transformers(case: Case, limits: Limits, bar: float) -> Iterator[Bar]:
    """Time over its best chunk size, and peak memory over the chunk size that needs least."""
    ours, others = ours_and_peers(run_case(case, limits, seconds=RUN_SECONDS, all_variants=True))
    named = "" if case.op == CPU_CASE.op else f"{case.op}, "
    what = f"{named}{case.direction}, {case.groups} group{'s' if case.groups > 1 else ''}"
    others = [row for row in others if row.timing is not None]
    if ours.timing is None or not others:
        yield Bar(f"{what}: time and memory", None, bar, reason=ours.status)
        return
    best = min(others, key=lambda row: row.timing.median_s)
    yield Bar(f"{what}: time over {best.name}", ours.ratios[best.name], bar)
    peaks = [row.peak_bytes for row in (ours, *others)]
    least = None if None in peaks else ours.peak_bytes / min(peaks[1:])
    yield Bar(f"{what}: peak memory over transformers' least", least, 0.25, reason="peaks cannot be measured here")


def per_channel(case: Case) -> Bar:
    """The gated delta rule with a decay for every channel of the keys, over one for each head."""
    calls = {}
    for op in ("gated_delta", "gated_delta_per_channel"):
        calls[op] = step(OPS[op].function, make_inputs(replace(case, op=op)), backward=case.backward)
    timings = measure_in_turns(calls, repeats=7)
    ratio = timings["gated_delta_per_channel"].ratio_to(timings["gated_delta"])
    return Bar(
        f"gated_delta, {case.direction}: a decay for each channel over one for each head", ratio, PER_CHANNEL_BAR
    )


def ours_and_peers(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """The row of the backend that ``auto`` takes, and those of the peers."""
    case = rows[0].case
    taken = choose_backend(case.op, "auto", OPS[case.op].backends, case.request)
    return next(row for row in rows if row.name == taken), [row for row in rows if row.kind == "peer"]


def linearity(short: int, long: int) -> Bar:
    """Forward at two lengths, batch 1, into an output whose memory is there: its first touch costs as much again."""
    case, calls = replace(CPU_CASE, batch=1), {}
    taken = choose_backend(case.op, "auto", OPS[case.op].backends, case.request)
    scan_into = OPS[case.op].backends[taken].load(f"ssd_into_{taken}")
    for num_frames in (short, long):
        inputs = list(make_inputs(replace(case, num_frames=num_frames)).values())
        y = torch.zeros_like(inputs[0])
        calls[num_frames] = lambda y=y, inputs=inputs: scan_into(y, *inputs, None, None)
    with torch.no_grad():
        timings = measure_in_turns(calls, repeats=7)
    what = f"forward at {long:,} frames over {short:,}, batch 1, output preallocated"
    return Bar(what, timings[long].ratio_to(timings[short]), 7)


def normalised_scan() -> Bar:
    """The scan of normalised linear attention, its division included, over SSD with as many heads and features."""
    case = replace(CPU_CASE, groups=CPU_CASE.heads, d_state=2 * CPU_CASE.head_dim)
    inputs = make_inputs(case) | {"D": None}
    ones = torch.ones(case.batch, case.num_frames, case.heads, 1)
    features = [inputs[name].softmax(-1) for name in ("C", "B")]
    streams = (features[0], torch.cat([inputs["x"], ones], dim=-1), features[1], ones[..., 0], ones[..., :0])
    scan = FeatureScan(case.heads)
    with torch.no_grad():
        calls = {
            "normalised": lambda: scan.average_(scan(streams, None, state=None, reverse=False)[0]),
            "ssd": lambda: ssd(**inputs),
        }
        timings = measure_in_turns(calls, repeats=25)
    figure = timings["normalised"].ratio_to(timings["ssd"])
    return Bar(f"normalised scan over ssd, forward, {case.heads} groups, d_state {case.d_state}", figure, 1.3)


def layer_inference(num_frames: int) -> Bar:
    layer, x = bidirectional_layer(num_frames)
    with torch.no_grad():
        calls = {"layer": lambda: layer(x), "projections": lambda: [linear(x) for linear in projections(layer)]}
        timings = measure_in_turns(calls, repeats=5)
    figure = timings["layer"].ratio_to(timings["projections"])
    return Bar(f"BiMamba2 at {num_frames:,} frames, inference over its own projections by nn.Linear", figure, 1.1)


def layer_training(num_frames: int) -> Bar:
    """Forward and backward, for the parameters and the input; the projections one by one, each with its backward."""
    layer, x = bidirectional_layer(num_frames)
    x.requires_grad_()

    def train(module: nn.Module) -> tuple[Tensor, ...]:
        y = module(x)
        return torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))

    calls: dict[str, Callable] = {"layer": lambda: train(layer)}
    calls["projections"] = lambda: [train(linear) for linear in projections(layer)]
    timings = measure_in_turns(calls, repeats=3)
    figure = timings["layer"].ratio_to(timings["projections"])
    return Bar(f"BiMamba2 at {num_frames:,} frames, training step over that of its own projections", figure, 2.0)


def bidirectional_layer(num_frames: int) -> tuple[Bidirectional, Tensor]:
    torch.manual_seed(0)
    return Bidirectional(WIDTH, HEADS), torch.randn(1, num_frames, WIDTH)


def projections(layer: Bidirectional) -> list[nn.Linear]:
    """Both directions' input and output projections; the inner width is the layer's own, so all take the same input.

    As torch's own linear layers: the mixers' inference has a faster one (cald_speech/mixers/base.py).
    """
    ours = [linear for one in (layer.forwards, layer.backwards) for linear in (one.in_proj, one.out_proj)]
    plain = []
    for linear in ours:
        plain.append(nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None))
        plain[-1].weight, plain[-1].bias = linear.weight, linear.bias
    return plain


def first_call_s(case: Case) -> float:
    """Seconds of :func:`first_call` in a process of its own, which finds none of Triton's compiled kernels."""
    if case.device == "cpu":
        return first_call(case)
    call = f"from cald_speech.benchmarks import bars; print(bars.first_call(bars.GPU_CASES[{case.op!r}]))"
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-c", call],
            env=os.environ | {"TRITON_CACHE_DIR": empty},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return float(done.stdout.splitlines()[-1])


def first_call(case: Case) -> float:
    """Seconds of the first forward and backward pass in this process, once the device itself is up."""
    inputs = make_inputs(case)
    return seconds_of(step(OPS[case.op].function, inputs, backward=True), device=case.device)
