#!/usr/bin/env bash
# Does an installation work on a bare machine? Builds the sdist, from it the wheel, installs that into an environment of
# its own as a user would, and runs the commands in a folder that knows nothing of the checkout.
#
#   scripts/try_install.sh [PYTHON [TORCH]]    such as: scripts/try_install.sh python3.13 2.8.0
#
# PYTHON is python3 unless said. Without TORCH pip chooses; with it, torchaudio is of the same version. EXTRAS (gpu unless
# said) are those of cald-speech. Some 6 GB come from the index and lie in $TMPDIR until the end.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} torch=${2:-} extras=${EXTRAS-gpu}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
say() { printf '\n== %s\n' "$*"; }

say "$("$python" --version): sdist, and a wheel of it"
"$python" -m venv "$place/env"
pip() { "$place/env/bin/python" -m pip --disable-pip-version-check "$@"; }
mkdir "$place/sources" "$place/dist" "$place/empty"
git ls-files -z | xargs -0 cp --parents -t "$place/sources" # building leaves files beside the sources
pip install -q "setuptools>=77"
(cd "$place/sources" && "$place/env/bin/python" -c "from setuptools.build_meta import build_sdist as b; b('$place/dist')" >"$place/log" 2>&1) ||
    { cat "$place/log"; exit 1; }
pip wheel -q --no-deps --wheel-dir "$place/dist" "$place"/dist/*.tar.gz
(cd "$place/dist" && ls -sh1)

say "installation${extras:+ with [$extras]}${torch:+ beside torch $torch}"
[ -z "$torch" ] || echo "torch==$torch
torchaudio==$torch" >"$place/pins"
pip install -q --no-compile ${torch:+-c "$place/pins"} "$(echo "$place"/dist/*.whl)${extras:+[$extras]}"
pip list 2>/dev/null | grep -E '^(torch|torchaudio|transformers|speechbrain|triton|numpy|cald-speech) '
pip check || true

cd "$place/empty"
export PATH="$place/env/bin:$PATH" HF_HUB_OFFLINE=1 CALD_SPEECH_CACHE="$place/cache"
unset PYTHONPATH
say "cald-speech --help"
cald-speech --help >help.txt && head -3 help.txt
say "cald-speech doctor"
cald-speech doctor | sed -n '/^broken/,$p'
say "a conversion, and a recording read"
python - <<'END'
import numpy as np, soundfile
generator = np.random.default_rng(0)
for name in "ab":
    soundfile.write(f"{name}.wav", 0.1 * generator.standard_normal(2 * 16_000), 16_000)
with open("table.csv", "w") as file:
    file.write("path,text\na.wav,turn on the light\nb.wav,stop\n")
END
teacher=$(python -c "from cald_speech.shipped import model_folder; print(model_folder('recipes/demo/teacher'))")
cald-speech convert "$teacher" converted | tail -1
cald-speech transcribe a.wav --model converted --format json
say "a training of two steps"
cald-speech train hparams/asr/student.yaml --train table.csv --valid table.csv --teacher recipes/demo/teacher \
    --num_steps 2 --precision fp32 --output_folder trained --noprogressbar
cald-speech evaluate trained/model table.csv --quiet | tail -1
say "all of it works"
