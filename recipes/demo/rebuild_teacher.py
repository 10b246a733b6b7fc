"""Rebuild recipes/demo/teacher, which ships with the demo: `python recipes/demo/rebuild_teacher.py`, in a checkout.

It synthesises some four hours of commands and trains hparams/demo/teacher.yaml, then demo/teacher_more.yaml, which took
some 50 minutes on one core of a busy machine. The weights are stored in float16, half the size; loading gives float32.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCTC, AutoProcessor

from cald_speech.recipes.demo.corpus_plan import TEACHER_SPLITS
from cald_speech.recipes.demo.synthesis import synthesise_corpus

ROOT = Path(__file__).resolve().parents[2]
TRAINED, SHIPPED = ROOT / "results/demo/teacher_more/model", ROOT / "recipes/demo/teacher"


def main() -> None:
    synthesise_corpus(ROOT / "results/demo/teacher_data", splits=TEACHER_SPLITS)
    for experiment in ("hparams/demo/teacher.yaml", "hparams/demo/teacher_more.yaml"):
        subprocess.run([sys.executable, "recipes/librispeech/train.py", experiment], cwd=ROOT, check=True)
    shutil.rmtree(SHIPPED, ignore_errors=True)
    AutoModelForCTC.from_pretrained(TRAINED, dtype=torch.float16).save_pretrained(SHIPPED)
    AutoProcessor.from_pretrained(TRAINED).save_pretrained(SHIPPED)


if __name__ == "__main__":
    main()
