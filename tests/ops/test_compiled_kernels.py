"""The kernels that the interpreter runs also compile for real GPUs, at their real sizes, and hardly spill registers.

What the interpreter accepts the compiler may not; a kernel that needs too much shared memory fails here too.
"""

import json
import os
import subprocess
import sys

import pytest

KERNELS = {
    "short_conv": {"forward_kernel", "backward_kernel"},
    "selective_scan": {"chunks_kernel", "carry_kernel", "outputs_kernel", "gradients_kernel"},
    "delta-channels": {
        *(f"{name}_kernel" for name in ("chunks", "states", "outputs")),
        *(f"{name}_gradient_kernel" for name in ("states", "pairs", "keys")),
    },
}
SSD_KERNELS = {"decays", "states", "carry", "outputs", "inputs_gradient", "maps_gradient"}
# A stack this small is a handful of registers, once for 16 frames.
MAX_SPILLED_BYTES = 64
# What a branch around the whole of a kernel that fills its registers has cost: some 25 registers more, spilled once.
MAX_SPILLED_FOR_A_PAIR = 128


def compiled(tmp_path, *command):
    """What a program prints that compiles for GPUs that are not here."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def usage(tmp_path, *ops):
    """For each op what each of its kernels uses, in the order of the first launch."""
    return map(json.loads, compiled(tmp_path, "-m", "tests.ops.compile_launches", "bfloat16", "90", *ops))


@pytest.mark.slow  # a Python process that compiles kernels
@pytest.mark.parametrize(
    "ops", [("short_conv", "selective_scan"), pytest.param(("delta-channels",), marks=pytest.mark.wide)], ids=" ".join
)
def test_kernels_compile_for_hopper(ops, tmp_path):
    for op, used in zip(ops, usage(tmp_path, *ops), strict=True):
        assert {one["kernel"] for one in used} == KERNELS[op]
        assert [one for one in used if one["spilled_bytes"] > MAX_SPILLED_BYTES] == []
        assert max(one["shared_bytes"] for one in used) <= 48 * 1024


@pytest.mark.slow  # a Python process that compiles kernels
@pytest.mark.parametrize(
    ("capability", "sizes", "dtype", "scan"),
    [
        (80, "64x128", "bfloat16", "both"),
        (90, "3x5", "float32", "both"),
        pytest.param(80, "64x128", "float32", "delta", marks=pytest.mark.wide),
    ],
)
def test_other_sizes_compile_and_fit_into_shared_memory(capability, sizes, dtype, scan, tmp_path):
    """At the largest state on the older GPU, and in float32; Hopper in bfloat16 is for the tests around this one."""
    program = "from cald_speech.commands import main; main()"
    options = f"benchmark kernels --capability {capability} --sizes {sizes} --dtype {dtype} --scans {scan}".split()
    lines = compiled(tmp_path, "-c", program, *options)
    expected = KERNELS["delta-channels"] if scan == "delta" else {f"{name}_kernel" for name in SSD_KERNELS}
    assert {line.split("|")[5].strip() for line in lines[2:]} == expected


@pytest.mark.slow
def test_a_pair_of_scans_takes_the_shared_memory_of_one_and_hardly_spills_more(tmp_path):
    one, pair = usage(tmp_path, "one", "pair")
    assert {kernel["kernel"] for kernel in one} == {f"{name}_kernel" for name in SSD_KERNELS}
    for single, both in zip(one, pair, strict=True):
        assert both["kernel"] == single["kernel"] and both["warps"] == single["warps"]
        assert both["shared_bytes"] <= single["shared_bytes"]
        assert both["spilled_bytes"] <= single["spilled_bytes"] + MAX_SPILLED_FOR_A_PAIR
