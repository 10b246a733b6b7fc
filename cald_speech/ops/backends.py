"""Which implementation of an op runs: an argument of the op, never a silent fallback.

Every op has a table of its backends, fastest first: each with the module it lives in, which is imported when it is
first chosen, so that triton and a compiler are needed by nobody else, and with what keeps it from running a request.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from cald_speech.ops.operators import call_operator


@dataclass(frozen=True)
class Request:
    """What is asked of an op: enough to say whether a backend can do it, with or without tensors at hand.

    sizes : the op's own, by name, such as ``head_dim`` and ``d_state``; ``elements`` counts its largest tensor.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op, or of several that share their kernels.

    module : where it lives. The function for an op is called ``<op>_<backend>`` there, such as ``ssd_pair_triton``. It
        takes what the op takes but for ``backend``, and is given all of it: defaults and checks are the op's.
    why_not : why it cannot run a request, with the way out, or None where it can.
    auto_on : the device types on which ``auto`` considers it.
    differentiable_forwards : whether torch differentiates its steps, in forward mode too. Others write backward passes.
    """

    module: str
    why_not: Callable[[Request], str | None] = lambda request: None
    auto_on: tuple[str, ...] = ("cpu", "cuda", "mps", "xpu", "meta")
    differentiable_forwards: bool = False

    def load(self, function: str) -> Callable:
        """A function of its module, which is imported now."""
        return getattr(importlib.import_module(self.module), function)


def run_op(
    op: str,
    backend: str,
    backends: Mapping[str, Backend],
    request: Callable[[], Request],
    *tensors: Any,
    **options: Any,
) -> Any:
    """Choose a backend and call it: the one way from an op to what implements it.

    Without autocast: a backend works in the dtypes that it is given, and says which these are. With lengths of its own
    on a CPU: whoever writes to the caller's before the backward pass would send that beyond its memory.

    Under ``torch.compile`` and the transforms of ``torch.func`` it is the op's operator that is called, which chooses
    when it runs; under ``torch.export``, whatever backend is asked for, steps of torch alone.
    """
    device = (tensors[0] if isinstance(tensors[0], Tensor) else tensors[0][0]).device
    if is_exported():
        check_known(op, backend, backends)
        with without_autocast(device):
            return importlib.import_module("cald_speech.ops.traced").TRACED[op](*tensors, **options)
    if torch.compiler.is_compiling() or (backend != "naive" and is_transformed((*tensors, *options.values()))):
        check_known(op, backend, backends)
        return call_operator(op, backend, *tensors, **options)
    request = request()
    name = choose_backend(op, backend, backends, request)
    if not backends[name].differentiable_forwards and any(map(has_tangent, (*tensors, options.get("initial_state")))):
        raise ValueError(
            f"backend: {op} has no forward-mode derivative with {name!r}, and an input carries a tangent. "
            "Pass backend='naive', which has, or differentiate backwards."
        )
    if (lengths := options.get("lengths")) is not None:
        options["lengths"] = lengths.to(device, copy=device.type == "cpu")
    tensors, options = _as_written(tensors), {key: _as_written(v) for key, v in options.items()}
    with without_autocast(device):
        return backends[name].load(f"{op}_{name}")(*tensors, **options)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For tensors on a device; nothing at all where autocast is off, so that a graph stays in one piece.

    Example
    -------
    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
    ...     torch.is_autocast_enabled("cpu")
    False
    """
    kind = "cpu" if device.type == "meta" else device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _as_written(v: Any) -> Any:
    """Tensors with the signs in memory that they have: torch keeps some negations to itself, and kernels see none."""
    if isinstance(v, tuple | list):
        return tuple(map(_as_written, v))
    return v.resolve_neg() if isinstance(v, Tensor) else v


def check_is_tensor(name: str, v: Any) -> None:
    """Raise ValueError for whatever else it is, and for tensors whose numbers do not lie in rows: sparse, nested.

    Example
    -------
    >>> check_is_tensor("x", [1.0])
    Traceback (most recent call last):
    ...
    ValueError: x: expected a tensor, got list
    """
    if not isinstance(v, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(v).__name__}")
    if v.layout != torch.strided or v.is_nested:
        raise ValueError(f"{name}: expected a dense tensor, got one of layout {v.layout}: call to_dense() on it")


def device_of(x: Tensor) -> torch.device:
    """Where its values are: ``meta``, which is nowhere, for tensors of FakeTensorMode too.

    Example
    -------
    >>> device_of(torch.ones(1, device="meta")), device_of(torch.ones(1))
    (device(type='meta'), device(type='cpu'))
    """
    # What traces a graph of it will have values.
    return torch.device("meta") if isinstance(x, FakeTensor) and not torch.compiler.is_compiling() else x.device


def has_tangent(v: Any) -> bool:
    """Whether a tensor, or one of a pair of them, is to be differentiated in forward mode.

    Example
    -------
    >>> has_tangent(torch.ones(1)), has_tangent(None)
    (False, False)
    """
    if isinstance(v, tuple | list):
        return any(map(has_tangent, v))
    return isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None


def is_exported() -> bool:
    """Whether ``torch.export`` traces.

    The compiler, which reads Python itself, takes ``is_exporting()`` for True. So does an export that is ``strict``,
    which lets it read: there an op is an operator, as in what is compiled.

    Example
    -------
    >>> is_exported()
    False
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_transformed(v: Any) -> bool:
    """Whether a tensor, or one of some, is in a transform of ``torch.func``, such as vmap.

    Example
    -------
    >>> is_transformed(torch.ones(1)), torch.vmap(lambda x: x * is_transformed(x))(torch.ones(2))
    (False, tensor([1., 1.]))
    """
    if torch._C._functorch.peek_interpreter_stack() is None:  # no transform runs: every call of an op asks
        return False
    if isinstance(v, tuple | list):
        return any(map(is_transformed, v))
    return isinstance(v, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(v)


def values_can_be_seen(v: Tensor) -> bool:
    """Whether there are values, and looking at them ends no graph that is being traced.

    Example
    -------
    >>> values_can_be_seen(torch.ones(1)), values_can_be_seen(torch.ones(1, device="meta"))
    (True, False)
    """
    return not torch.compiler.is_compiling() and device_of(v).type != "meta" and not is_transformed(v)


def choose_backend(op: str, asked: str, backends: Mapping[str, Backend], request: Request) -> str:
    """The name of the backend that runs: the one asked for, or for ``auto`` the first that can.

    Raises ValueError for a backend that this op does not have, and for one that cannot run the request.

    Example
    -------
    >>> backends = {"naive": Backend("cald_speech.ops.ssd.naive")}
    >>> choose_backend("ssd", "auto", backends, Request(torch.device("cpu"), torch.float32))
    'naive'
    """
    if asked == "auto":
        fit = (
            name for name, one in backends.items() if request.device.type in one.auto_on and not one.why_not(request)
        )
        if (name := next(fit, None)) is None:
            raise ValueError(f"backend: {op} has none that 'auto' takes on {request.device}: pass backend='torch'.")
        return name
    check_known(op, asked, backends)
    if reason := backends[asked].why_not(request):
        raise ValueError(f"backend: {op} cannot run with {asked!r} here: {reason}")
    return asked


def check_known(op: str, asked: str, backends: Mapping[str, Backend]) -> None:
    """Raise ValueError for a backend that this op does not have."""
    if not isinstance(asked, str) or (asked != "auto" and asked not in backends):
        raise ValueError(
            f"backend: {op} expected one of {', '.join(('auto', *backends))}, got {asked!r}. "
            "The torch backend runs on every device."
        )


def why_not_torch(request: Request) -> str | None:
    """Why the ``torch`` backend cannot run a request, or None: how it cuts up a call depends on values.

    Example
    -------
    >>> why_not_torch(Request(torch.device("meta"), torch.float32))
    "it looks at values, and the tensors have none (meta device or FakeTensorMode): pass backend='naive'."
    """
    if request.device.type == "meta":
        return "it looks at values, and the tensors have none (meta device or FakeTensorMode): pass backend='naive'."
    return None


def why_not_triton(request: Request) -> str | None:
    """Why Triton kernels cannot run on a device at all: the part that is the same for every op."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install 'triton>=3.6', or pass backend='torch'."
    if request.dtype == torch.float64:
        return "float64 is for gradient checks, which the torch backend runs: pass backend='torch'."
    if request.device.type != "cuda" and not (request.device.type == "cpu" and interpreted()):
        return (
            f"it needs a CUDA device, and the tensors are on {request.device}. Move them, pass backend='torch', or set "
            "TRITON_INTERPRET=1 before the first import of triton to try the kernels on a CPU, slowly."
        )
    if request.device.type != "cuda" and request.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16 with TRITON_INTERPRET=1."
    return None


def why_not_native(request: Request) -> str | None:
    """Why the compiled kernels cannot run a request (device, dtype, no compiler), or None; compiles them if need be.

    Example
    -------
    >>> why_not_native(Request(torch.device("cpu"), torch.float64))
    "its arithmetic is float32, and the input is torch.float64: pass backend='torch'."
    """
    if request.device.type != "cpu":
        return f"it is compiled for CPUs, and the tensors are on {request.device}: pass backend='auto' or 'torch'."
    if request.dtype == torch.float64:
        return f"its arithmetic is float32, and the input is {request.dtype}: pass backend='torch'."
    reason = importlib.import_module("cald_speech.ops.native").why_not_built()
    return reason and f"{reason} Or pass backend='torch'."


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def values_are_checked() -> bool:
    """Whether ops look at values too (dt > 0, A < 0), which on a GPU waits for the device: ``CALD_SPEECH_DEBUG=1``."""
    return os.environ.get("CALD_SPEECH_DEBUG", "0") == "1"
