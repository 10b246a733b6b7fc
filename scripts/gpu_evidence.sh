#!/usr/bin/env bash
# What a GPU is for, in one call: parity, a training step of wav2vec2-large's conversion and its days for LibriSpeech,
# a student against its SDPA teacher up to an hour of audio, 24 hours, SmolLM2's shape, the project's bars. Run
# scripts/gpu_check.sh first. Needs torch, triton and transformers, and nothing beside this checkout.
#
#   scripts/gpu_evidence.sh                  evidence.json and evidence_log.txt go to $OUT (results/gpu_evidence)
#   scripts/gpu_evidence.sh --budget 200     most valuable first; what there is no time for is skipped, and said so
#   DRY_RUN=1 scripts/gpu_evidence.sh        the same program at tiny sizes on a CPU, where figures mean nothing
#
# The exit status is 0 only if nothing failed; what needs too much memory or time is a figure and no failure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
OUT=${OUT:-results/gpu_evidence}
mkdir -p "$OUT" || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
unset TRITON_INTERPRET
HOW=(--device cuda)
[ -n "${DRY_RUN:-}" ] && HOW=(--device cpu --size tiny --budget 3600)

"$PYTHON" -m cald_speech.benchmarks.gpu_evidence "${HOW[@]}" --output_folder "$OUT" "$@" 2>&1 | tee "$OUT/evidence_log.txt"
