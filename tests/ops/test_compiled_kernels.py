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


# What a branch around the whole of a kernel that fills its registers has cost: some 25 registers more, spilled once.
MAX_SPILLED_FOR_A_PAIR = 128


def usage(op, repository, tmp_path):
    """What each kernel of an op uses, in the order of its first launch."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.compile_launches", op, "bfloat16", "90"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_compile_for_hopper(op, repository, tmp_path):
    used = usage(op, repository, tmp_path)
    assert {one["kernel"] for one in used} == KERNELS[op]
    assert [one for one in used if one["spilled_bytes"] > MAX_SPILLED_BYTES] == []
    assert max(one["shared_bytes"] for one in used) <= 48 * 1024


@pytest.mark.slow
def test_a_pair_of_scans_takes_the_shared_memory_of_one_and_hardly_spills_more(repository, tmp_path):
    one, pair = (usage(op, repository, tmp_path) for op in ("ssd", "ssd_pair"))
    for single, both in zip(one, pair, strict=True):
        assert both["kernel"] == single["kernel"] and both["warps"] == single["warps"]
        assert both["shared_bytes"] <= single["shared_bytes"]
        assert both["spilled_bytes"] <= single["spilled_bytes"] + MAX_SPILLED_FOR_A_PAIR
