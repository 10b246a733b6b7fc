"""No speed without parity: in the same run, before it is timed, every backend is compared with the float64 recurrence.

At small sizes with lengths (one of them 0) and without, in both directions, with a state before and after where the op
has one, and once over more frames than any backend's block: outputs, final state and the gradient of every input.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cald_speech.benchmarks.ops_workloads import OPS, Case, make_inputs

# The largest difference allowed, as a fraction of the largest expected value: two float32 algorithms for one result,
# and the rounding of inputs, products and outputs in half precision. The tests' table holds the same.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# A peer need only compute the same function: mamba-ssm multiplies float32 in TF32.
PEER_TOLERANCE = 3e-2
LENGTHS = (150, 67, 0)
MANY_FRAMES = 577  # one sequence: the recurrence's backward pass is quadratic in the frames


def parity_fault(case: Case, backend: str) -> str | None:
    """What a backend gets wrong at a small size of the case's kind, in words, or None.

    Example
    -------
    >>> parity_fault(Case("short_conv", batch=1, num_frames=10, heads=2, groups=1), "torch") is None
    True
    """
    small = _small(case)
    checks = [(small, LENGTHS, False), (replace(small, batch=1, num_frames=MANY_FRAMES), None, False)]
    if OPS[case.op].carries:
        checks += [(small, LENGTHS, True), (small, None, True)]
    for check in checks:
        inputs, options, expected = reference(*check)
        actual = outputs_and_gradients(OPS[case.op].function, inputs, backend=backend, **options)
        if fault := first_fault(actual, expected, TOLERANCE[case.dtype]):
            size, lengths, reverse = check
            return f"{fault} (T {size.num_frames}, lengths {lengths}{', in reverse' if reverse else ''})"
    return None


@cache
def reference(
    case: Case, lengths: tuple[int, ...] | None, reverse: bool
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """The inputs and options of a check and what they give in float64, computed once for all backends."""
    op, inputs = OPS[case.op], make_inputs(case)
    if op.carries:
        _, state = op.function(**inputs, return_final_state=True, backend="naive")
        inputs["initial_state"] = torch.randn_like(state).requires_grad_()
    options = {"lengths": None if lengths is None else torch.tensor(lengths, device=case.device)}
    options |= {"reverse": reverse} if op.carries else {}
    exact = {name: v.detach().double().requires_grad_() for name, v in inputs.items()}
    expected = outputs_and_gradients(op.function, exact, backend="naive", **options)
    return inputs, options, {name: v.detach() for name, v in expected.items()}


def peer_fault(case: Case, call: Callable[..., Tensor], lacks: tuple[str, ...]) -> str | None:
    """The same for a peer's output, with neither lengths nor direction; ``lacks`` are inputs that it does not take."""
    inputs = {name: v for name, v in make_inputs(replace(_small(case), backward=False)).items() if name not in lacks}
    exact = {name: v.double() for name, v in inputs.items()}
    expected = OPS[case.op].function(**exact, backend="naive")
    return first_fault({"output": call(inputs)}, {"output": expected}, PEER_TOLERANCE)


def outputs_and_gradients(function: Callable, inputs: Mapping[str, Tensor], **options) -> dict[str, Tensor]:
    """Output, final state where there is one, and the gradient of every input under fixed random weights of both."""
    carries = "initial_state" in inputs
    made = function(**inputs, **(options | ({"return_final_state": True} if carries else {})))
    outputs = made if carries else (made,)
    generator = torch.Generator().manual_seed(1)
    # Eighths, which every dtype holds exactly.
    weights = [torch.randint(-8, 9, v.shape, generator=generator).to(v.device, v.dtype) / 8 for v in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
    named = dict(zip(("output", "final state"), outputs, strict=False))
    return named | {f"gradient of {name}": v for name, v in zip(inputs, gradients, strict=True)}


def first_fault(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> str | None:
    """The first tensor that differs by more than the tolerance, and by how much.

    Example
    -------
    >>> first_fault({"output": torch.tensor([1.0, 2.1])}, {"output": torch.tensor([1.0, 2.0])}, 1e-2)
    'output is off by 5.0e-02 of its largest value, and 1.0e-02 is allowed'
    """
    for name, exact in expected.items():
        largest = exact.abs().max().clamp(min=1e-12)
        error = ((actual[name].double() - exact.double()).abs().max() / largest).item()
        if not error <= tolerance:  # NaN too
            return f"{name} is off by {error:.1e} of its largest value, and {tolerance:.1e} is allowed"
    return None


def _small(case: Case) -> Case:
    """Two heads, with one group or one each, in float64's reach."""
    groups = 1 if case.groups == 1 else 2
    return replace(case, batch=len(LENGTHS), num_frames=max(LENGTHS), heads=2, groups=groups, backward=True)
