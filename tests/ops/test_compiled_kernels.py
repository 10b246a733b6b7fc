"""The kernels that the interpreter tests run also compile for a real GPU, at their real sizes, without spilling."""

import json
import os
import subprocess
import sys

import pytest

KERNELS = {
    "short_conv": {"forward_kernel", "backward_kernel"},
    "selective_scan": {"chunks_kernel", "carry_kernel", "outputs_kernel", "gradients_kernel"},
}
# A stack this small is a handful of registers, once for 16 frames.
MAX_SPILLED_BYTES = 64


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_compile_for_hopper(op, repository, tmp_path):
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.compile_launches", op, "bfloat16", "90"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=environment)
    assert done.returncode == 0, done.stderr
    used = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in used} == KERNELS[op]
    assert [one for one in used if one["spilled_bytes"] > MAX_SPILLED_BYTES] == []
    assert max(one["shared_bytes"] for one in used) <= 48 * 1024
