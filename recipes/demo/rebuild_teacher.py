"""Rebuild recipes/demo/teacher, the model that ships with the demo: `python recipes/demo/rebuild_teacher.py`.

It synthesises the demo's corpus and trains hparams/demo_teacher.yaml on it, about half an hour on two CPU cores. The
weights are stored in float16, half the size; loading gives float32 again.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCTC, AutoProcessor

from cald_speech.data.synthesis import synthesise_corpus

ROOT = Path(__file__).resolve().parents[2]
TRAINED, SHIPPED = ROOT / "results/demo/teacher/model", ROOT / "recipes/demo/teacher"

if __name__ == "__main__":
    synthesise_corpus(ROOT / "results/demo/data")
    command = [sys.executable, "recipes/librispeech/train.py", "hparams/demo_teacher.yaml"]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.rmtree(SHIPPED, ignore_errors=True)
    AutoModelForCTC.from_pretrained(TRAINED, dtype=torch.float16).save_pretrained(SHIPPED)
    AutoProcessor.from_pretrained(TRAINED).save_pretrained(SHIPPED)
