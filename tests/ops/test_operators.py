"""The ops as operators of torch: what a tracer is told of them is true, and what it exports has any length."""

from unittest import mock

import pytest
import torch

from cald_speech import ops
from cald_speech.ops import OPS
from cald_speech.ops.operators import SIGNATURES
from tests.helpers import NATIVE, needs_native
from tests.ops.cases import CARRYING, assert_same, bits_differ, call, exact, make_inputs, run

EVERY_OP = pytest.mark.parametrize("op", OPS)


def corners(*ops):
    """These in every run, the others where the wide matrices are."""
    return [op if op in ops else pytest.param(op, marks=pytest.mark.wide) for op in OPS]


def traced(op, inputs, **options):
    """Outputs and gradients of what torch.export is shown."""
    with mock.patch.object(torch.compiler, "is_exporting", lambda: True):
        return run(op, inputs, "auto", **options)


@pytest.mark.parametrize("op", corners("short_conv"))
@pytest.mark.parametrize("backend", [NATIVE, pytest.param("torch", marks=pytest.mark.wide)])
def test_an_operator_is_what_it_says(op, backend):
    signature, inputs = SIGNATURES[op], make_inputs(op, 5, batch=2)
    sides = {"_past": " past", "_future": " future"}
    tensors = [inputs["".join(sides.get(f"_{p}", p) for p in [*name.split("_")])] if op == "ssd_pair" else inputs[name]
               for name in signature.names]  # fmt: skip
    settings = {"reverse": True, "chunk_size": None, "activation": "silu"}
    given = (*(v.requires_grad_() for v in tensors), torch.tensor([5, 2]))
    given += (*(settings[name] for name in signature.options), backend)
    found = torch.library.opcheck(getattr(torch.ops.cald_speech, op).default, given)
    assert set(found.values()) == {"SUCCESS"}


@needs_native
@pytest.mark.parametrize("op", corners("gated_delta"))
def test_compiled_as_one_graph_it_is_the_same_to_the_bit(op):
    inputs, lengths = make_inputs(op, 9), torch.tensor([9, 4, 0])
    function = lambda given: call(op, given, "auto", lengths=lengths)  # noqa: E731
    found = []
    for each in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
        outputs = each(leaves)
        gradients = torch.autograd.grad([v.sum() for v in outputs.values()], list(leaves.values()))
        found.append({name: v.detach() for name, v in outputs.items()} | dict(zip(leaves, gradients, strict=True)))
    assert bits_differ(*found) == []


def test_an_export_has_steps_of_torch_and_what_is_compiled_the_operator():
    class Model(torch.nn.Module):
        def forward(self, x, weight):
            return ops.short_conv(x, weight, backend="torch")

    given, compiled = tuple(make_inputs("short_conv", 5)[name] for name in ("x", "weight")), []
    torch.compile(Model(), backend=lambda graph, _: compiled.append(graph.code) or graph, fullgraph=True)(*given)
    programs = [torch.export.export(Model(), given, strict=strict) for strict in (True, False)]
    strict, plain = (program.graph_module.code for program in programs)
    operator = "torch.ops.cald_speech.short_conv"
    assert operator in compiled[0] and operator in strict and operator not in plain
    assert all(torch.allclose(program.module()(*given), Model()(*given), atol=1e-6) for program in programs)


@EVERY_OP
@pytest.mark.parametrize("num_frames", [70, *(pytest.param(n, marks=pytest.mark.wide) for n in (1, 300))])
def test_what_is_exported_equals_the_recurrence(op, num_frames):
    for options in [{"reverse": False}, {"reverse": True}] if op in CARRYING else [{}]:
        inputs, lengths = make_inputs(op, num_frames), torch.tensor([num_frames, num_frames // 2, 0])
        assert_same(traced(op, inputs, **options), exact(op, inputs, **options))
        assert_same(traced(op, inputs, lengths=lengths, **options), exact(op, inputs, lengths, **options))


@pytest.mark.wide
def test_what_is_exported_of_decays_by_channel():
    inputs = make_inputs("gated_delta", 70, per_channel=True)
    assert_same(traced("gated_delta", inputs), exact("gated_delta", inputs))


@EVERY_OP
def test_slices_of_vmap_are_the_op(op):
    inputs = make_inputs(op, 5)
    batched = {name: torch.stack([v, v]) for name, v in inputs.items()}
    found = torch.vmap(lambda given: call(op, given, "auto"))(batched)
    expected = call(op, inputs, "auto")
    for name, v in expected.items():
        assert torch.equal(found[name], torch.stack([v, v])), name


def test_a_second_derivative_is_refused():
    inputs = {name: v.requires_grad_() for name, v in make_inputs("ssd", 5).items()}
    compiled = torch.compile(lambda x: ops.ssd(**(inputs | {"x": x})), backend="eager", fullgraph=True)
    gradient = torch.autograd.grad(compiled(inputs["x"]).sum(), inputs["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()
