"""What our ops are compared with, on the same tensors in the same run: each peer called as its own library calls it.

A peer takes the tensors of a case, already in the layout and dtype that it wants: only its own work is timed. None of
them knows lengths or a direction: for both directions the second pass flips its inputs and its output, as the
reference implementations of bidirectional Mamba do.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech.ops.backends import Request

CHUNK_SIZES = (64, 128, 256)
# Of mamba-ssm, whose kernels compute element offsets in int32: from here on they wrap around, and read elsewhere.
MOST_ELEMENTS = 2**31 - 1
MAMBA_SSM_CHUNK_SIZE = 256  # what the reference Mamba-2 models use
INSTALL = "pip install --no-build-isolation mamba-ssm (MAMBA_SKIP_CUDA_BUILD=TRUE where there is no nvcc)"


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


def transformers_delta(chunk_size: int) -> Callable[..., Tensor]:
    """Qwen3-Next's; it divides queries by the root of their size, which :func:`for_transformers` has taken back."""

    def scan(v: Tensor, q: Tensor, k: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        rule = of_transformers("qwen3_next", "torch_chunk_gated_delta_rule")
        return rule(q, k, v, g, beta, chunk_size=chunk_size)[0]

    return scan


def for_transformers(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    q = inputs["q"]
    return dict(inputs) | {"q": (q.detach() * q.size(-1) ** 0.5).requires_grad_(q.requires_grad)}


def mamba_ssm_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """The upstream Triton kernels (Dao & Gu, arXiv 2405.21060; state-spaces/mamba).

    They autotune on their first call for each size, sum some gradients with atomics (two runs can differ in the last
    bits), multiply float32 in TF32 (errors near 1e-3), and hold their offsets in 32 bits, which is looked at here.
    """
    check_offsets(x, B, C, MAMBA_SSM_CHUNK_SIZE)
    return upstream()(x, dt, A, B, C, MAMBA_SSM_CHUNK_SIZE, D=D)


def why_not_mamba_ssm(request: Request) -> str | None:
    """Why the upstream kernels cannot run a request, with the way out, or None where they can.

    Example
    -------
    >>> why_not_mamba_ssm(Request(torch.device("cpu"), torch.float32)) is None
    False
    """
    if importlib.util.find_spec("mamba_ssm") is None:
        return f"the package mamba-ssm is not installed: {INSTALL}."
    if request.device.type != "cuda":
        return f"its kernels need a CUDA device, and the tensors are on {request.device}."
    if request.dtype == torch.float64:
        return "it has no float64, which is for gradient checks."
    if (elements := request.sizes.get("elements", 0)) > MOST_ELEMENTS:
        return _too_many("the largest input", elements)
    return None


def check_offsets(x: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> None:
    """Raise ValueError where an offset of the kernels, into their inputs or their scratch, would pass 2^31.

    The scratch of the backward pass counts also where no gradient is asked for: it is the largest, and a forward pass
    that works where training does not would surprise.
    """
    batch, num_frames, heads, head_dim = x.shape
    chunks = -(-num_frames // chunk_size)
    per_frame = batch * chunks * chunk_size * heads
    counts = {
        "x, as far as its strides reach,": _reach(x),
        "B, as far as its strides reach,": _reach(B),
        "C, as far as its strides reach,": _reach(C),
        "batch x frames x heads x chunk_size": per_frame * chunk_size,
        "batch x frames x heads x d_state": per_frame * B.size(3),
        "batch x chunks x heads x head_dim x d_state": batch * chunks * heads * head_dim * B.size(3),
    }
    for what, count in counts.items():
        if count > MOST_ELEMENTS:
            raise ValueError(_too_many(what, count))


@functools.cache
def upstream() -> Callable:
    """mamba-ssm's ``mamba_chunk_scan_combined``. Its Triton kernels need none of its CUDA extensions.

    Releases before 2.3 import the extension ``selective_scan_cuda`` at the top of the package. Where that was not
    built, an empty module stands in for it during the import alone: nobody else finds it in ``sys.modules``, and
    upstream's own Mamba-1 functions fail when they are called, as they would anyway.
    """
    name = "selective_scan_cuda"
    stub = name not in sys.modules and importlib.util.find_spec(name) is None
    if stub:
        sys.modules[name] = ModuleType(name, "stands in for mamba-ssm's CUDA extension while mamba-ssm is imported")
    try:
        return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    finally:
        if stub:
            del sys.modules[name]


def _reach(v: Tensor) -> int:
    """Elements from the first of a strided tensor to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(v.shape, v.stride(), strict=True)) if v.numel() else 0


def _too_many(what: str, count: int) -> str:
    return (
        f"{what} comes to {count:,} elements, and the upstream kernels hold offsets in 32 bits, up to "
        f"{MOST_ELEMENTS:,}. Use a smaller batch or shorter sequences."
    )


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
    "gated_delta": {
        f"transformers, chunks of {n}": Peer(transformers_delta(n), for_transformers, on_cpu) for n in (32, 64)
    },
    "gated_delta_per_channel": {},
}
