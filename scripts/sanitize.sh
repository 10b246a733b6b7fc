#!/usr/bin/env bash
# The native kernels under the address and undefined-behaviour sanitizers: their tests, and random requests of every op.
#
#   scripts/sanitize.sh [CASES]    1,000 requests unless said; needs gcc with its sanitizers
#
# They are compiled for it into a folder of their own. The first fault ends its process, with a report of where it is.
set -euo pipefail
cd "$(dirname "$0")/.."
cases=${1:-1000} python=${PYTHON:-.venv/bin/python} compiler=${CC:-gcc}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

# A compiler that adds to what it is asked for; itself it runs without the sanitizers, and optimises little: at -O3 it
# takes minutes.
cat >"$place/cc" <<END
#!/bin/sh
LD_PRELOAD= exec $compiler "\$@" -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
END
chmod +x "$place/cc"
export CC=$place/cc CALD_SPEECH_CACHE=$place/kernels OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Python is not compiled for them: their libraries come first by force. It frees little at its end, which is no leak.
libraries="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so)"
sanitized() {
    LD_PRELOAD=$libraries ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 "$python" "$@"
}

sanitized -c "from cald_speech.ops.native import library; library()" # where there is none, tests would be skipped
# Without the tests that reserve gigabytes which nobody touches: a sanitizer does.
sanitized -m pytest -q -p no:cacheprovider tests/ops/test_native.py tests/ops/test_contract.py \
    -k "native and not past_two_to_the_31"

seq "$cases" | sed 's/^/native /' | sanitized -m tests.faults.ops >"$place/requests"
"$python" - "$place/requests" "$cases" <<'END'
import collections, json, sys
answers = [json.loads(line) for line in list(open(sys.argv[1]))[1:]]
found = collections.Counter(answer["outcome"] for answer in answers)
print(f"{len(answers)} requests under the sanitizers: {dict(found)}")
sys.exit(len(answers) != int(sys.argv[2]) or bool(set(found) - {"used", "refused"}))
END
