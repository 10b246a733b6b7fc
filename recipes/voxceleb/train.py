"""VoxCeleb1 speaker identification: fine-tune a teacher, then convert and distil it, as in the paper (2410.06846).

    python recipes/voxceleb/train.py hparams/voxceleb/teacher.yaml --data_folder data/voxceleb1
    python recipes/voxceleb/train.py hparams/voxceleb/student.yaml --data_folder data/voxceleb1 --guidance hybrid

recipes/voxceleb/evaluate.py scores.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
