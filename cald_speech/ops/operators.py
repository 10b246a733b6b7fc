"""The ops as operators of torch: ``torch.ops.cald_speech.ssd`` and so on, which ``torch.compile`` takes as they are.

A compiler cannot look into C or Triton, and PyTorch loops over blocks would be unrolled. So whoever traces an op, but
for ``torch.export``, gets one operator, whatever the backend: its shapes are known without running it (a fake kernel),
its gradient is another operator, and what it runs is the op itself, on the backend that the op then chooses. Called
without a tracer an op goes straight to its backend, whose own autograd keeps from the forward pass what it needs; the
operator's gradient has the inputs alone, and scans them once more.

Under ``torch.vmap`` an operator runs once for each slice. It has no derivative in forward mode, and no second one.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "cald_speech"
SIDES = ("past", "future")


@dataclass(frozen=True)
class Signature:
    """What an operator takes and gives, in the order of its schema.

    tensors : by name; those with a question mark may be None.
    options : by name, with torch's name of their type.
    states : from the tensors to the shape of the final state; None for an op without one.
    like : the tensor that y has the shape and dtype of; one for each y.
    wide_state : whether a state has float32 at least.
    """

    tensors: tuple[str, ...]
    options: Mapping[str, str]
    state: Callable[[Mapping[str, Tensor]], tuple[int, ...]] | None = None
    like: tuple[str, ...] = ("x",)
    wide_state: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that have gradients, without question marks."""
        return tuple(name.removesuffix("?") for name in self.tensors)

    def named(self, arguments: Sequence[Any]) -> dict[str, Tensor | None]:
        """The tensors by name, of an operator's arguments."""
        return dict(zip(self.names, arguments[: len(self.tensors)], strict=True))

    def schema(self, before: str = "", returns: str = "") -> str:
        tensors = [f"Tensor{'?' * name.endswith('?')} {name.removesuffix('?')}" for name in self.tensors]
        options = [f"{kind} {name}" for name, kind in self.options.items()]
        outputs = ", ".join(["Tensor"] * (len(self.like) + (self.state is not None)))
        given = ", ".join(filter(None, (before, *tensors, "Tensor? lengths", *options, "str backend")))
        return f"({given}) -> {returns or (outputs if ',' not in outputs else f'({outputs})')}"

    def outputs(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Empty ones."""
        made = [torch.empty_like(tensors[name], memory_format=torch.contiguous_format) for name in self.like]
        if self.state is not None:
            first = tensors[self.like[0]]
            dtype = torch.promote_types(first.dtype, torch.float32) if self.wide_state else first.dtype
            made.append(first.new_empty(self.state(tensors), dtype=dtype))
        return made


SCANNED = ("x", "dt", "A", "B", "C", "D?")
CARRIED = {"reverse": "bool", "chunk_size": "SymInt?"}
SIGNATURES = {
    "ssd": Signature((*SCANNED, "initial_state?"), CARRIED, lambda v: (*_without_frames(v["x"]), v["B"].size(3))),
    "ssd_bidirectional": Signature(SCANNED, {"chunk_size": "SymInt?"}),
    "ssd_pair": Signature(
        tuple(f"{name.removesuffix('?')}_{side}{'?' * name.endswith('?')}" for name in SCANNED for side in SIDES),
        {"chunk_size": "SymInt?"},
        like=tuple(f"x_{side}" for side in SIDES),
    ),
    "selective_scan": Signature(
        (*SCANNED, "initial_state?"), CARRIED, lambda v: (*_without_frames(v["x"]), v["B"].size(3))
    ),
    "gated_delta": Signature(
        ("q", "k", "v", "beta", "g", "initial_state?"),
        CARRIED,
        lambda v: (*_without_frames(v["v"]), v["k"].size(3)),
        like=("v",),
    ),
    "short_conv": Signature(
        ("x", "weight", "bias?", "initial_state?"),
        {"reverse": "bool", "activation": "str"},
        lambda v: (*_without_frames(v["x"]), v["weight"].size(1) - 1),
        wide_state=False,
    ),
}


def _without_frames(v: Tensor) -> tuple[int, ...]:
    return (v.size(0), *v.shape[2:])


def call_operator(op: str, backend: str, *tensors: Any, **options: Any) -> Any:
    """What the op gives for these arguments, by its operator: ``tensors`` and ``options`` are those of ``run_op``."""
    signature = SIGNATURES[op]
    with_state = options.pop("return_final_state", False)
    initial_state = (options.pop("initial_state", None),) if "initial_state" in signature.names else ()
    if op == "ssd_pair":
        tensors = [v for pair in tensors for v in (pair or (None, None))]
    operator = getattr(torch.ops.cald_speech, op).default
    settings = [options[name] for name in signature.options]
    found = operator(*tensors, *initial_state, options["lengths"], *settings, backend)
    return found if signature.state is None or with_state else found[0]


def run_inside(op: str, arguments: Sequence[Any]) -> list[Tensor]:
    """The op itself, on an operator's arguments; its outputs in a list."""
    signature = SIGNATURES[op]
    count, named = len(signature.tensors), signature.named(arguments)
    named |= dict(zip(("lengths", *signature.options, "backend"), arguments[count:], strict=True))
    if op == "ssd_pair":
        pairs = {name.removesuffix("?"): [] for name in SCANNED}
        for name, pair in pairs.items():
            pair += [named.pop(f"{name}_{side}") for side in SIDES]
        named |= pairs | {"D": None if pairs["D"][0] is None else pairs["D"]}
    if signature.state is not None:
        named["return_final_state"] = True
    found = getattr(importlib.import_module("cald_speech.ops"), op)(**named)
    return [found] if isinstance(found, Tensor) else list(found)


def gradients_inside(op: str, grads: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    """Of the tensors that are not None, by a forward pass of the op and its backward pass."""
    arguments = list(arguments)
    for i in range(len(SIGNATURES[op].tensors)):
        arguments[i] = None if arguments[i] is None else arguments[i].detach().requires_grad_()
    leaves = [v for v in arguments[: len(SIGNATURES[op].tensors)] if v is not None]
    # An operator runs below autograd, which leaves out its own keys; here they are wanted.
    here = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(*here), torch.enable_grad():
        outputs = run_inside(op, arguments)
        grads = [g.to(v.dtype) for g, v in zip(grads, outputs, strict=True)]
        # An output that nothing leads to is a state of no frames.
        leading = [(v, g) for v, g in zip(outputs, grads, strict=True) if v.requires_grad]
        return list(
            torch.autograd.grad(
                [v for v, _ in leading], leaves, [g for _, g in leading], allow_unused=True, materialize_grads=True
            )
        )


def own(found: Sequence[Tensor], expected: Sequence[Tensor], given: Sequence[Any]) -> list[Tensor]:
    """As an operator's results must be: of the dtypes and strides that were told before, in memory of their own."""
    taken = {v.untyped_storage().data_ptr() for v in given if isinstance(v, Tensor)}
    results = []
    for v, like in zip(found, expected, strict=True):
        v = v.detach().to(like.dtype).contiguous()
        v = v.clone() if v.untyped_storage().data_ptr() in taken else v
        taken.add(v.untyped_storage().data_ptr())
        results.append(v)
    return results


def define(op: str, signature: Signature) -> None:
    """Register the operator of an op, and that of its gradient."""
    count, outputs = len(signature.tensors), len(signature.like) + (signature.state is not None)
    one = (lambda found: found[0]) if outputs == 1 else tuple
    grad_names = [f"grad_{i}" for i in range(outputs)]

    def forward(*arguments: Any) -> Any:
        return one(own(run_inside(op, arguments), signature.outputs(signature.named(arguments)), arguments))

    def forward_fake(*arguments: Any) -> Any:
        return one(signature.outputs(signature.named(arguments)))

    def backward(*arguments: Any) -> list[Tensor]:
        grads, arguments = arguments[:outputs], arguments[outputs:]
        expected = [v for v in arguments[:count] if v is not None]
        return own(gradients_inside(op, grads, arguments), expected, (*grads, *arguments))

    def backward_fake(*arguments: Any) -> list[Tensor]:
        given = [v for v in arguments[outputs : outputs + count] if v is not None]
        return [torch.empty_like(v, memory_format=torch.contiguous_format) for v in given]

    def keep(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[: count + 1])  # lengths too
        ctx.settings = inputs[count + 1 :]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple:
        tensors = ctx.saved_tensors
        found = iter(gradient(*grads, *tensors, *ctx.settings))
        each = [None if v is None else next(found) for v in tensors[:count]]
        return *each, *[None] * (1 + len(ctx.settings))

    forwards = _custom_op(op, forward, signature.schema())
    forwards.register_fake(forward_fake)
    schema = signature.schema(before=", ".join(f"Tensor {name}" for name in grad_names), returns="Tensor[]")
    gradient = _custom_op(f"{op}_backward", backward, schema)
    gradient.register_fake(backward_fake)
    forwards.register_autograd(differentiate, setup_context=keep)
    for operator in (forwards, gradient):
        operator.register_vmap(_slice_by_slice(operator))


def _custom_op(name: str, function: Callable, schema: str) -> Any:
    return torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=schema)


def _slice_by_slice(operator: Any) -> Callable:
    """A rule for torch.vmap: the operator on each slice of what is batched."""

    def rule(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        found = [
            operator(*(v if d is None else v.select(d, i) for v, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        stacked = type(found[0])(map(torch.stack, zip(*found, strict=True)))
        return stacked, type(stacked)([0] * len(stacked))

    return rule


for name, signature in SIGNATURES.items():
    define(name, signature)
