"""Every op on a CUDA device: parity with the recurrence in float64, determinism, and tensors past 2^31 elements.

Skipped where there is no such device; `scripts/gpu_check.sh` runs it where there is one. Parity is the benchmark's own
check: with lengths and in both directions, outputs, final states and the gradient of every input; in float32 its bar
is one that TF32 products would miss.
"""

import os

import pytest
import torch

from cald_speech.benchmarks.cases import OPS, Case, make_inputs
from cald_speech.benchmarks.contest import parity_fault
from cald_speech.ops.backends import choose_backend
from tests.helpers import TOLERANCE, relative_error
from tests.ops.cases import Way, assert_same, exact

pytestmark = pytest.mark.gpu
# A trial of scripts/gpu_check.sh runs some of them elsewhere.
DEVICE = os.environ.get("CALD_SPEECH_GPU_TESTS_ON", "cuda")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
GROUPS = pytest.mark.parametrize("groups", [1, 2], ids=["one group", "group per head"])
EVERY_OP = pytest.mark.parametrize("op", list(OPS))
EVERY_BACKEND = pytest.mark.parametrize(
    ("op", "backend"), [(op, name) for op in OPS for name in OPS[op].backends if name != "naive"]
)
PAIR = Way("ssd_pair", "triton")
PAIR_TOLERANCE = {
    torch.float32: TOLERANCE["parity"],
    torch.bfloat16: TOLERANCE["bfloat16"],
    torch.float16: TOLERANCE["float16"],
}
# 2.2 thousand million elements in x: past 2^31, in bfloat16 4.1 GiB.
LARGE = {"batch": 12, "num_frames": 180_000, "heads": 16, "groups": 1}
LARGE_GIB = {"gated_delta": 85, "gated_delta_per_channel": 100}  # 70 for all others


def case_of(op, *, backward=True, **sizes):
    defaults = {"batch": 2, "num_frames": 130, "heads": 2, "groups": 1, "dtype": torch.bfloat16}
    return Case(op, device=DEVICE, backward=backward, **(defaults | {"d_state": OPS[op].d_state} | sizes))


def skip_unless_it_runs(case, backend):
    if reason := OPS[case.op].backends[backend].why_not(case.request):
        pytest.skip(reason)


def gradients(case, inputs, **options):
    """Output and gradients, under a fixed gradient of the output."""
    y = OPS[case.op].function(**inputs, **options)
    weights = torch.ones_like(y)
    return [y.detach(), *torch.autograd.grad(y, list(inputs.values()), weights)]


@GROUPS
@DTYPES
@EVERY_BACKEND
def test_parity(op, backend, dtype, groups):
    case = case_of(op, dtype=dtype, groups=groups)
    skip_unless_it_runs(case, backend)
    assert parity_fault(case, backend) is None


@pytest.mark.parametrize(("head_dim", "d_state"), [(32, 16), (64, 128), (48, 80)], ids=lambda n: str(n))
@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, name) for op in OPS if "ssd" in op or "delta" in op for name in OPS[op].backends if name != "naive"],
)
def test_parity_at_other_sizes(op, backend, head_dim, d_state):
    case = case_of(op, head_dim=head_dim, d_state=d_state)
    skip_unless_it_runs(case, backend)
    assert parity_fault(case, backend) is None


@pytest.mark.parametrize(("head_dim", "d_state"), [(64, 64), (64, 128), (48, 80)], ids=lambda n: str(n))
@DTYPES
def test_parity_of_a_pair(dtype, head_dim, d_state):
    inputs, lengths = pair_in(dtype, head_dim=head_dim, d_state=d_state), torch.tensor([130, 67])
    assert_same(PAIR.run(inputs, lengths), exact(PAIR.op, inputs, lengths), PAIR_TOLERANCE[dtype])


def pair_in(dtype, **sizes):
    """x, B and C in a dtype; the rest stays in float32, as the mixers keep it."""
    inputs = PAIR.inputs(130, batch=2, heads=2, groups=1, **sizes)
    return {name: v.to(dtype) if name.split()[0] in "xBC" else v for name, v in inputs.items()}


def test_small_runs_of_a_pair_finish():
    """For the checkers, as below."""
    results = PAIR.run(pair_in(torch.bfloat16), torch.tensor([130, 67]))
    assert all(v.isfinite().all() for v in results.values())


@EVERY_OP
def test_two_runs_are_equal_to_the_bit(op):
    case = case_of(op, num_frames=1_000, heads=16)
    first, second = (gradients(case, make_inputs(case)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@EVERY_OP
def test_small_runs_finish(op):
    """For the memory and race checkers, which make everything slow: no reference, both directions, with lengths."""
    case, lengths = case_of(op), torch.tensor([130, 67], device=DEVICE)
    backend = choose_backend(op, "auto", OPS[op].backends, case.request)
    for options in ({}, {"reverse": True}) if OPS[op].carries else ({},):
        results = gradients(case, make_inputs(case), lengths=lengths, backend=backend, **options)
        assert all(v.isfinite().all() for v in results)


@EVERY_OP
def test_strided_views_that_reach_past_2_31_elements(op):
    """The second sequence of x or v begins 2^31 elements behind the first."""
    case, like = case_of(op, backward=False), OPS[op].like
    inputs = make_inputs(case)
    x = inputs[like]
    far = torch.empty(2**31 + x[0].numel(), dtype=x.dtype, device=DEVICE)
    far = far.as_strided(x.shape, (2**31, *x.stride()[1:])).copy_(x)
    expected = OPS[op].function(**inputs)
    assert torch.equal(OPS[op].function(**inputs | {like: far}), expected)


@EVERY_OP
def test_past_2_31_elements_the_last_sequence_is_as_if_alone(op):
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    if free_gib < (needed := LARGE_GIB.get(op, 70)):
        pytest.skip(f"needs {needed} GiB of free GPU memory, and there are {free_gib:.0f}")
    case = case_of(op, **LARGE)
    inputs = make_inputs(case)
    assert inputs[OPS[op].like].numel() > 2**31
    by_batch = {name: v for name, v in inputs.items() if v.size(0) == case.batch and v.dim() > 2}
    together = dict(zip(("y", *inputs), gradients(case, inputs), strict=True))
    last = {name: v.detach()[-1:].clone() if name in by_batch else v.detach().clone() for name, v in inputs.items()}
    alone = gradients(case, {name: v.requires_grad_() for name, v in last.items()})
    alone = dict(zip(("y", *inputs), alone, strict=True))
    errors = {name: relative_error(together[name][-1:], alone[name]) for name in ("y", *by_batch)}
    assert all(error <= TOLERANCE["bfloat16"] for error in errors.values()), errors
