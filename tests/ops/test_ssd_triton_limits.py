"""The Triton kernels of SSD where sizes end: past 2^31 elements, refused, and compiled for GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch

from cald_speech.ops import ssd
from cald_speech.ops.ssd.triton import warmup
from tests.helpers import TOLERANCE, relative_error
from tests.ops.test_ssd_triton import DEVICE, SCANS, call, make_inputs, ssd_triton


@SCANS
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "frames", "heads"])
def test_offsets_past_2_31_elements(axis, scan):
    """x, B, C and dy whose sequences, frames or heads lie 2^31 elements apart; only the touched pages exist."""
    inputs = make_inputs(scan, 2, groups=2, head_dim=4, d_state=4, left_out=("initial_state",))
    inputs = {name: v.half() if name in ("x", "B", "C") else v for name, v in inputs.items()}
    far = torch.empty(2**31 + 512, dtype=torch.float16, device=DEVICE)
    strides = [64, 32, 16]
    strides[axis] = 2**31
    places = {"x": 0, "B": 4, "C": 8, "dy": 12}
    views = {name: far.as_strided((2, 2, 2, 4), (*strides, 1), start) for name, start in places.items()}
    values = {name: inputs.get(name, torch.ones(2, 2, 2, 4).half()).to(DEVICE) for name in places}
    for name, view in views.items():
        view.copy_(values[name])
    dy = views.pop("dy")
    leaves = {name: v.detach().to(DEVICE).requires_grad_() for name, v in (inputs | views).items()}
    y = call(scan, leaves)[0]
    actual = [y, *torch.autograd.grad(y, list(leaves.values()), dy)]
    near = {name: v.double().requires_grad_() for name, v in inputs.items()}
    y = call(scan, near, backend="naive", device="cpu")[0]
    expected = [y, *torch.autograd.grad(y, list(near.values()), torch.ones_like(y))]
    errors = [relative_error(a.detach().cpu(), e.detach()) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) <= TOLERANCE["float16"], errors


@pytest.mark.parametrize(("head_dim", "d_state"), [(67, 16), (16, 129)])
def test_sizes_beyond_the_limits_are_refused_by_name(head_dim, d_state):
    inputs = make_inputs("forward", 1, head_dim=head_dim, d_state=d_state)
    with pytest.raises(ValueError, match=rf"head_dim {head_dim} and d_state {d_state}.*backend='torch'"):
        ssd(**{name: v.to(DEVICE) for name, v in inputs.items()}, backend="triton")


def test_the_op_reaches_the_kernels():
    inputs = {name: v.to(DEVICE) for name, v in make_inputs("forward", 9).items()}
    assert torch.equal(ssd(**inputs, backend="triton"), ssd_triton(**inputs))


def test_warmup_runs_every_direction():
    warmup(2, 4, 1, 4, torch.float16, DEVICE)


@pytest.mark.parametrize(
    ("capability", "sizes", "dtype"), [(90, "64x64", "bfloat16"), (80, "64x128", "bfloat16"), (90, "3x5", "float32")]
)
def test_kernels_compile_for_a_gpu(capability, sizes, dtype):
    """What the interpreter accepts the compiler may not; a kernel that needs too much shared memory fails here too."""
    program = "from cald_speech.commands import main; main()"
    options = f"benchmark kernels --capability {capability} --sizes {sizes} --dtype {dtype} --directions both".split()
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line.split("|")[5].strip() for line in done.stdout.splitlines()[2:]}
    kernels = {"decays", "states", "carry", "outputs", "inputs_gradient", "maps_gradient"}
    assert names == {f"{name}_kernel" for name in kernels}
