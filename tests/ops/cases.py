"""What the contract asks of: every op in every way that a backend has, random inputs, outputs with gradients."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech import ops
from tests.helpers import TOLERANCE, relative_error

CARRYING = ("ssd", "selective_scan", "gated_delta", "short_conv")  # they take a direction, and hand on a state
SCANS = ("ssd", "ssd_bidirectional", "ssd_pair", "selective_scan", "gated_delta")
FRAMEWISE = ("x", "dt", "B", "C", "q", "k", "v", "beta", "g")
STEPS = ("dt", "beta", "g")  # where these are 0, a frame leaves the state alone
CHANNELS, HEAD_DIM, D_STATE = 6, 3, 5
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Way:
    """One way through one op.

    how : what else distinguishes it: the torch backend scans short sequences all at once.
    borders : numbers of frames around those at which it begins another block.
    frames : enough for several blocks.
    sizes : of its inputs, where the interpreter asks for less.
    options : of every call.
    """

    op: str
    backend: str
    how: str = ""
    borders: tuple[int, ...] = (1, 63, 64, 65, 300)
    frames: int = 70
    sizes: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.op, self.backend, self.how)))

    @property
    def device(self) -> str:
        return TRITON_DEVICE if self.backend == "triton" else "cpu"

    def inputs(self, num_frames: int | None = None, **sizes: Any) -> dict[str, Tensor]:
        return make_inputs(self.op, self.frames if num_frames is None else num_frames, **(dict(self.sizes) | sizes))

    def call(self, inputs: Mapping[str, Tensor], lengths: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
        return call(self.op, inputs, self.backend, lengths=lengths, **(dict(self.options) | options))

    def run(self, inputs: Mapping[str, Tensor], lengths: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
        """Outputs and gradients, on the CPU."""
        there = {name: v.to(self.device) for name, v in inputs.items()}
        lengths = None if lengths is None else lengths.to(self.device)
        return run(self.op, there, self.backend, lengths=lengths, **(dict(self.options) | options))


def make_inputs(
    op: str,
    num_frames: int,
    *,
    batch: int = 3,
    groups: int = 2,
    heads: int = 4,
    head_dim: int = HEAD_DIM,
    channels: int = CHANNELS,
    d_state: int = D_STATE,
    taps: int = 4,
    per_channel: bool = False,
    strength: float | None = None,
    left_out: tuple[str, ...] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """An op's inputs by name, in float32 on the CPU; those of a pair are called ``x past``, ``x future`` and so on.

    Decays forget within one to some 100 frames; ``strength`` makes every rate that strong, and steps even up to 1.
    per_channel : of the gated delta rule, a decay for every channel of the keys.
    """
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    frames = (batch, num_frames)

    def steps(*shape: int) -> Tensor:
        return F.softplus(randn(*shape) - 2) if strength is None else torch.rand(shape, generator=g)

    def rates(*shape: int) -> Tensor:
        return -torch.rand(shape, generator=g).mul(3).exp() / 4 if strength is None else torch.full(shape, -strength)

    if op == "short_conv":
        made = {
            "x": lambda: randn(*frames, channels),
            "weight": lambda: randn(channels, taps),
            "bias": lambda: randn(channels),
            "initial_state": lambda: randn(batch, channels, taps - 1),
        }
    elif op == "gated_delta":
        decayed = (*frames, heads, d_state) if per_channel else (*frames, heads)
        made = {
            "q": lambda: F.normalize(randn(*frames, groups, d_state), dim=-1),
            "k": lambda: F.normalize(randn(*frames, groups, d_state), dim=-1),
            "v": lambda: randn(*frames, heads, head_dim),
            "beta": lambda: torch.rand(*frames, heads, generator=g) * 1.5,
            "g": lambda: -steps(*decayed) * (1 if strength is None else strength),
            "initial_state": lambda: randn(batch, heads, head_dim, d_state),
        }
    else:
        ways = (2,) if op == "ssd_bidirectional" else ()
        units, size = ((channels,), ()) if op == "selective_scan" else ((heads,), (head_dim,))
        made = {
            "x": lambda: randn(*frames, *units, *size),
            "dt": lambda: steps(*frames, *ways, *units),
            "A": lambda: rates(*ways, *units, *(() if size else (d_state,))),
            "B": lambda: randn(*frames, groups, d_state),
            "C": lambda: randn(*frames, groups, d_state),
            "D": lambda: randn(*units),
            "initial_state": lambda: randn(batch, *units, *size, d_state),
        }
    if op not in CARRYING:
        made.pop("initial_state")
    sides = (" past", " future") if op == "ssd_pair" else ("",)
    return {name + side: new() for name, new in made.items() for side in sides if name not in left_out}


def like_output(op: str) -> str:
    """The input of y's shape; of a pair, without its side."""
    return "v" if op == "gated_delta" else "x"


def is_framewise(name: str) -> bool:
    return name.split()[0] in FRAMEWISE


def call(op: str, inputs: Mapping[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """The op's outputs by name: y, and the final state where it has one."""
    function = getattr(ops, op)
    if op == "ssd_pair":
        names = dict.fromkeys(name.split()[0] for name in inputs)
        pairs = {name: (inputs[f"{name} past"], inputs[f"{name} future"]) for name in names}
        return dict(zip(("y past", "y future"), function(**pairs, backend=backend, **options), strict=True))
    if op not in CARRYING:
        return {"y": function(**inputs, backend=backend, **options)}
    y, state = function(**inputs, backend=backend, return_final_state=True, **options)
    return {"y": y, "state": state}


def run(
    op: str, inputs: Mapping[str, Tensor], backend: str, *, poisoned: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Outputs and the gradient of every input under fixed weights of all outputs, on the CPU.

    poisoned : (B, T), where the gradient of y is NaN.
    """
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    outputs = call(op, leaves, backend, **options)
    g = torch.Generator().manual_seed(1)
    # Eighths, which every dtype holds exactly.
    weights = {name: (torch.randint(-8, 9, v.shape, generator=g) / 8).to(v) for name, v in outputs.items()}
    if poisoned is not None:
        for name in (name for name in weights if name.startswith("y")):
            weights[name][poisoned.to(weights[name].device)] = torch.nan
    kept = [name for name, v in outputs.items() if v.numel() and v.requires_grad]
    gradients = torch.autograd.grad(
        [outputs[name] for name in kept],
        list(leaves.values()),
        [weights[name] for name in kept],
        allow_unused=True,
        materialize_grads=True,
    )
    named = outputs | {f"gradient of {name}": v for name, v in zip(leaves, gradients, strict=True)}
    return {name: v.detach().cpu() for name, v in named.items()}


def exact(op: str, inputs: Mapping[str, Tensor], lengths: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """What the naive backend gives in float64."""
    return run(op, {name: v.double() for name, v in inputs.items()}, "naive", lengths=lengths, **options)


@cache
def exact_of(op: str, num_frames: int, sizes: tuple, lengths: tuple[int, ...] | None, options: tuple) -> dict:
    """The same for inputs of these sizes, worked out once for all ways."""
    inputs = make_inputs(op, num_frames, **dict(sizes))
    return exact(op, inputs, None if lengths is None else torch.tensor(lengths), **dict(options))


def assert_same(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE["parity"]
) -> None:
    errors = {name: relative_error(actual[name], v) for name, v in expected.items()}
    assert all(error <= tolerance for error in errors.values()), errors


def bits_differ(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [name for name, v in expected.items() if not torch.equal(actual[name], v)]
