"""What our ops are compared with, on the same tensors in the same run: each peer called as its own library calls it.

A peer takes the tensors of a case, already in the layout and dtype that it wants: only its own work is timed. None of
them knows lengths or a direction: for both directions the second pass flips its inputs and its output, as the
reference implementations of bidirectional Mamba do.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech.ops.backends import Request
from cald_speech.ops.ssd.mamba_ssm import upstream, why_not_mamba_ssm

CHUNK_SIZES = (64, 128, 256)


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    call : takes the tensors that ``prepare`` makes of a case's, by name.
    prepare : outside the timing; the first tensor has the output's shape.
    why_not : why it cannot run a request, or None.
    lacks : inputs of the op that it does not take.
    computes_the_op : False for another function at the same width, which has no parity to check.
    """

    call: Callable[..., Tensor]
    prepare: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    why_not: Callable[[Request], str | None] = lambda request: None
    lacks: tuple[str, ...] = ()
    computes_the_op: bool = True


def on_cpu(request: Request) -> str | None:
    return None if request.device.type == "cpu" else "compared on a CPU, where transformers has no other path"


def on_cuda(package: str = "torch") -> Callable[[Request], str | None]:
    def why_not(request: Request) -> str | None:
        if request.device.type != "cuda":
            return "compared on a GPU"
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return why_not


@functools.cache
def of_transformers(model: str, function: str) -> Callable:
    """The PyTorch path of a function of transformers, beneath the choice of a kernel package that stands around it."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    if not hasattr(module, function):
        version = importlib.metadata.version("transformers")
        raise ValueError(f"transformers {version} has no {model}.{function}: install transformers>=5.23")
    return inspect.unwrap(getattr(module, function))


def both_directions(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Two passes of a scan over (x, dt, A, B, C, D), the second over flipped inputs, with its output flipped back."""

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
        past = scan(x, dt[:, :, 0], A[0], B, C, D)
        flipped = (v.flip(1) for v in (x, dt[:, :, 1], B, C))
        x, dt, B, C = flipped
        return past + scan(x, dt, A[1], B, C).flip(1)

    return call


def transformers_scan(chunk_size: int) -> Callable[..., Tensor]:
    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
        return of_transformers("mamba2", "mamba2_chunk_scan")(x, dt, A, B, C, chunk_size, D=D)

    return scan


def transformers_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return of_transformers("mamba2", "causal_conv1d_fn")(x.transpose(1, 2), weight, bias, activation="silu").transpose(
        1, 2
    )


def transformers_selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """It has one group, and channels before frames."""
    scan = of_transformers("mamba", "mamba_selective_scan")
    return scan(*(v.transpose(1, 2) for v in (x, dt)), A, *(v[:, :, 0].transpose(1, 2) for v in (B, C)), D).mT


def mamba_ssm_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    return upstream()(x, dt, A, B, C, 256, D=D)


def fla_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    repeats = x.size(2) // B.size(2)
    B, C = (v.repeat_interleave(repeats, 2) if repeats > 1 else v for v in (B, C))
    return chunk_simple_gla(q=C, k=B, v=x * dt[..., None].to(x.dtype), g=dt * A, scale=1.0)[0]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)


def as_attention(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of x's shape, laid out as attention wants them."""
    x = inputs["x"].detach().transpose(1, 2)
    return {name: torch.randn_like(x).contiguous().requires_grad_(inputs["x"].requires_grad) for name in "qkv"}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _scans(around: Callable[[Callable], Callable]) -> dict[str, Peer]:
    """The peers of a scan, each ``around`` its own."""
    on_a_cpu = {f"transformers, chunks of {n}": Peer(around(transformers_scan(n)), why_not=on_cpu) for n in CHUNK_SIZES}
    return on_a_cpu | {
        "mamba-ssm": Peer(around(mamba_ssm_scan), why_not=why_not_mamba_ssm),
        "flash-linear-attention": Peer(around(fla_scan), why_not=on_cuda("fla"), lacks=("D",)),
        "SDPA attention": Peer(attention, as_attention, on_cuda(), computes_the_op=False),
    }


PEERS = {
    "ssd": _scans(lambda scan: scan),
    "ssd_bidirectional": _scans(both_directions),
    "short_conv": {
        "transformers": Peer(transformers_conv),
        "causal-conv1d": Peer(causal_conv1d, why_not=on_cuda("causal_conv1d")),
    },
    "selective_scan": {"transformers": Peer(transformers_selective_scan, why_not=on_cpu)},
}
