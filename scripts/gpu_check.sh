#!/usr/bin/env bash
# Everything that only a GPU can show, in under 10 minutes and with nothing downloaded: parity of every op in every dtype
# (outputs, gradients, past 2^31 elements), the memory and race checkers at small sizes, the project's bars, and the
# benchmark with its peers. Needs torch 2.11, triton 3.6, transformers, pytest and click.
#
#   scripts/gpu_check.sh            the log and the tables go to $OUT (results/gpu_check)
#   PYTHON=... OUT=... scripts/gpu_check.sh
#   DRY_RUN=1 scripts/gpu_check.sh  the same steps on a CPU, at sizes that only find typing errors
#
# The exit status is 0 only if every step that ran passed. A step that has no tool to run says so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
OUT=${OUT:-results/gpu_check}
mkdir -p "$OUT" || exit 1
exec > >(tee "$OUT/log.txt") 2>&1
trap 'exec >&- 2>&-; wait' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
unset TRITON_INTERPRET
# What every step is given. A trial collects the large tests without running them, and runs the small ones on the CPU.
DEVICE=cuda PATIENCE=1
LARGE=() SMALL="small_runs" SIZES=() DELTA_SIZES=(--sizes 4x1500,10min --widths 1024)
if [ -n "${DRY_RUN:-}" ]; then
    DEVICE=cpu PATIENCE=10
    LARGE=(--collect-only) SMALL="small_runs and short_conv" SIZES=(--sizes 1x20 --widths 64 --seconds 0 --backends torch)
    DELTA_SIZES=("${SIZES[@]}")
    export CALD_SPEECH_GPU_TESTS_ON=cpu
fi

# 1. What is here. Each line of what is missing names the way out.
"$PYTHON" - <<'PYTHON_CODE'
import importlib.util
import os
import platform
import sys

missing = [name for name in ("torch", "triton", "transformers", "pytest", "click") if not importlib.util.find_spec(name)]
print(f"python {platform.python_version()}")
for name in missing:
    print(f"missing: {name} is not installed for {sys.executable}: pip install {name}, or set PYTHON to one that has it")
if "torch" not in missing:
    import torch

    print(f"torch {torch.__version__}")
    if torch.cuda.is_available():
        free, total = (number / 2**30 for number in torch.cuda.mem_get_info())
        print(f"device: {torch.cuda.get_device_name()}, {total:.0f} GiB ({free:.0f} free), CUDA {torch.version.cuda}")
    elif not os.environ.get("DRY_RUN"):
        missing.append("device")
        print("missing: a CUDA device (torch.cuda.is_available() is False). Run this on a machine that has one")
if "triton" not in missing:
    import triton

    print(f"triton {triton.__version__}")
sys.exit(bool(missing))
PYTHON_CODE
# shellcheck disable=SC2181
if [ $? -ne 0 ]; then
    echo "gpu_check: nothing was checked"
    exit 1
fi
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

# What every op gets here, and why: for the log alone, since packages of the recipes may be missing on such a machine.
timeout 60 "$PYTHON" -c 'from cald_speech.commands.doctor import diagnose; print(diagnose()[0])'

FAILED=()
# step NAME SECONDS COMMAND...: run it within so many seconds, say how long it took, and remember whether it failed.
step() {
    local name=$1 seconds=$2 start=$SECONDS status
    shift 2
    printf '\n== %s (at most %s s)\n' "$name" "$seconds"
    timeout --kill-after=5 $((seconds * PATIENCE)) "$@"
    status=$?
    [ $status -eq 124 ] && echo "$name: stopped after $seconds s"
    [ $status -ne 0 ] && FAILED+=("$name")
    echo "== $name: exit status $status after $((SECONDS - start)) s"
}

# 2. Parity, in several processes where pytest can: most of the time goes into compiling kernels.
WORKERS=()
"$PYTHON" -c 'import xdist' 2> /dev/null && WORKERS=(-n 4)
step "parity" 190 "$PYTHON" -m pytest -q tests/ops -m gpu -p no:cacheprovider -k "not 2_31" "${WORKERS[@]}" "${LARGE[@]}"
step "past 2^31 elements" 70 "$PYTHON" -m pytest -q tests/ops -m gpu -p no:cacheprovider -k "2_31" "${LARGE[@]}"

# 3. The checkers. Without torch's caching allocator, so that every tensor is an allocation with bounds of its own.
SANITIZER=$(command -v compute-sanitizer)
for candidate in /usr/local/cuda*/bin/compute-sanitizer; do
    [ -z "$SANITIZER" ] && [ -x "$candidate" ] && SANITIZER=$candidate
done
if [ -n "$SANITIZER" ]; then
    for tool in memcheck racecheck; do
        step "$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
            "$PYTHON" -m pytest -q tests/ops/test_on_gpu.py -p no:cacheprovider -k "$SMALL"
    done
else
    echo "compute-sanitizer was not found on the PATH or in /usr/local/cuda*/bin: no memory and race check was made"
    step "small runs" 45 "$PYTHON" -m pytest -q tests/ops/test_on_gpu.py -p no:cacheprovider -k "$SMALL"
fi

# 4. Speed. The tables stand in the log; their last lines, JSON, also in files of their own. The gated delta rule is
# measured by itself, for a benchmark that runs out of time leaves the last ops out.
BARS=(--bars)
[ -n "${DRY_RUN:-}" ] && BARS=(--bars --dry-run)
DELTA=gated_delta,gated_delta_per_channel
step "bars" 90 "$PYTHON" -m cald_speech.benchmarks.ops --device "$DEVICE" "${BARS[@]}"
step "gated delta rule" 50 "$PYTHON" -m cald_speech.benchmarks.ops --device "$DEVICE" --ops "$DELTA" --budget 30 \
    "${DELTA_SIZES[@]}"
step "benchmark" 85 "$PYTHON" -m cald_speech.benchmarks.ops --device "$DEVICE" --budget 60 \
    --ops ssd,ssd_bidirectional,short_conv,selective_scan "${SIZES[@]}"
grep '^\[{"what"' "$OUT/log.txt" > "$OUT/bars.json"
grep '^{"device"' "$OUT/log.txt" > "$OUT/benchmark.jsonl"

printf '\ngpu_check: %s s, log in %s\n' "$SECONDS" "$OUT/log.txt"
if [ ${#FAILED[@]} -ne 0 ]; then
    printf 'FAILED: %s\n' "${FAILED[@]}"
    exit 1
fi
echo "every step passed"
