"""RoBERTa to Linformer on QNLI, QQP, SST-2 or IMDB: fine-tune a teacher, then convert and distil it.

python recipes/glue/train.py hparams/glue/teacher.yaml --glue_task sst2
python recipes/glue/train.py hparams/glue/student.yaml --glue_task sst2 --guidance hybrid --sharing kv
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
