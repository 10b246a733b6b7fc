"""What the ops are measured on: one case is an op at a size, with random tensors like those of a trained layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech import ops
from cald_speech.benchmarks.stopwatch import least_traffic
from cald_speech.ops.backends import Backend, Request

# Batch and frames, at 50 frames a second.
SIZES = {"10s": (1, 500), "1min": (1, 3_000), "10min": (1, 30_000), "1h": (1, 180_000)}
HEAD_DIM = 64
TAPS = 4


@dataclass(frozen=True)
class Case:
    """An op at a size, in one dtype and on one device; ``backward`` adds the gradients of all inputs.

    Example
    -------
    >>> Case("ssd", batch=1, num_frames=500, heads=12, groups=1).width
    768
    """

    op: str
    batch: int
    num_frames: int
    heads: int
    groups: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backward: bool = False
    head_dim: int = HEAD_DIM
    d_state: int = 64

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def request(self) -> Request:
        """What a backend is asked before it is chosen."""
        elements = self.batch * self.num_frames * max(self.width, self.groups * self.d_state)
        sizes = {"head_dim": self.head_dim, "d_state": self.d_state, "width": TAPS, "elements": elements}
        return Request(torch.device(self.device), self.dtype, sizes)


@dataclass(frozen=True)
class Op:
    """An op with its backends.

    inputs : the tensors of a case by argument name, in float32; the first has the output's shape.
    like : the name of that one.
    operations : multiplications and additions for one frame of all heads, forwards.
    keeps : inputs that stay in float32 whatever the dtype, as the mixers keep them.
    carries : whether it takes ``reverse`` and hands on a state.
    d_state : what models give it.
    """

    function: Callable[..., Tensor]
    backends: Mapping[str, Backend]
    inputs: Callable[[Case, "Draw"], dict[str, Tensor]]
    operations: Callable[[Case], int]
    keeps: tuple[str, ...] = ("dt", "A", "D")
    carries: bool = True
    d_state: int = 64
    like: str = "x"


@dataclass(frozen=True)
class Draw:
    """Random float32 tensors on a generator's device."""

    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device)

    def steps(self, *shape: int) -> Tensor:
        """Step sizes with which a decay rate of 1 remembers some 5 to some 500 frames."""
        return F.softplus(self.normal(*shape) - 4)


def _ssd_inputs(case: Case, draw: Draw, directions: tuple[int, ...] = ()) -> dict[str, Tensor]:
    frames = (case.batch, case.num_frames)
    return {
        "x": draw.normal(*frames, case.heads, case.head_dim),
        "dt": draw.steps(*frames, *directions, case.heads),
        "A": -draw.uniform(*directions, case.heads).mul(2.5).exp(),
        "B": draw.normal(*frames, case.groups, case.d_state),
        "C": draw.normal(*frames, case.groups, case.d_state),
        "D": draw.normal(case.heads),
    }


def _short_conv_inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    return {
        "x": draw.normal(case.batch, case.num_frames, case.width),
        "weight": draw.normal(case.width, TAPS),
        "bias": draw.normal(case.width),
    }


def _selective_scan_inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    frames = (case.batch, case.num_frames)
    return {
        "x": draw.normal(*frames, case.width),
        "dt": draw.steps(*frames, case.width),
        "A": -(1.0 + torch.arange(case.d_state, device=draw.generator.device)).repeat(case.width, 1),
        "B": draw.normal(*frames, case.groups, case.d_state),
        "C": draw.normal(*frames, case.groups, case.d_state),
        "D": draw.normal(case.width),
    }


def _gated_delta_inputs(case: Case, draw: Draw, *, per_channel: bool = False) -> dict[str, Tensor]:
    frames, state = (case.batch, case.num_frames), (case.groups, case.d_state)
    channels = (case.d_state,) if per_channel else ()
    return {
        "v": draw.normal(*frames, case.heads, case.head_dim),
        "q": F.normalize(draw.normal(*frames, *state), dim=-1),
        "k": F.normalize(draw.normal(*frames, *state), dim=-1),
        "beta": draw.normal(*frames, case.heads).sigmoid(),
        "g": -draw.steps(*frames, case.heads, *channels) * draw.uniform(case.heads, *channels).mul(2.5).exp(),
    }


# Of a scan: the state's update and its product with C, a multiplication and an addition for each entry of the state.
OPS = {
    "ssd": Op(ops.ssd, ops.OPS["ssd"], _ssd_inputs, lambda case: 4 * case.width * case.d_state),
    "ssd_bidirectional": Op(
        ops.ssd_bidirectional,
        ops.OPS["ssd_bidirectional"],
        lambda case, draw: _ssd_inputs(case, draw, directions=(2,)),
        lambda case: 8 * case.width * case.d_state,
        carries=False,
    ),
    "short_conv": Op(
        ops.short_conv, ops.OPS["short_conv"], _short_conv_inputs, lambda case: 2 * TAPS * case.width, keeps=()
    ),
    "selective_scan": Op(
        ops.selective_scan,
        ops.OPS["selective_scan"],
        _selective_scan_inputs,
        lambda case: 4 * case.width * case.d_state,
        d_state=16,
    ),
    # Of the delta rule the product with k too, and the decay.
    "gated_delta": Op(
        ops.gated_delta,
        ops.OPS["gated_delta"],
        _gated_delta_inputs,
        lambda case: 7 * case.width * case.d_state,
        keeps=("beta", "g"),
        like="v",
    ),
    "gated_delta_per_channel": Op(
        ops.gated_delta,
        ops.OPS["gated_delta"],
        lambda case, draw: _gated_delta_inputs(case, draw, per_channel=True),
        lambda case: 7 * case.width * case.d_state,
        keeps=("beta", "g"),
        like="v",
    ),
}


def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a case, on its device; those that a backward pass needs gradients of ask for them."""
    op = OPS[case.op]
    draw = Draw(torch.Generator(case.device).manual_seed(seed))
    made = {name: v if name in op.keeps else v.to(case.dtype) for name, v in op.inputs(case, draw).items()}
    return {name: v.requires_grad_(case.backward) for name, v in made.items()}


def step(call: Callable[..., Tensor], inputs: Mapping[str, Tensor], *, backward: bool) -> Callable[[], object]:
    """What is timed: one call without gradients, or one with the gradients of all inputs.

    The first input has the output's shape.
    """
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return call(**inputs)

        return forward
    leaves = list(inputs.values())
    gradient = torch.randn_like(leaves[0])  # made beforehand: it comes from the layers above, not from the op
    return lambda: torch.autograd.grad(call(**inputs), leaves, gradient)


def least_work(case: Case, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Bytes and operations that no implementation of the case can do without."""
    operations = OPS[case.op].operations(case) * case.batch * case.num_frames
    num_bytes = least_traffic(inputs.values(), inputs[OPS[case.op].like], backward=case.backward)
    return num_bytes, operations * (3 if case.backward else 1)
