"""What the voice tells, on speechocean762: fine-tune a teacher, then convert and distil it.

    python recipes/speechocean762/train.py hparams/speechocean762/teacher.yaml --label gender
    python recipes/speechocean762/train.py hparams/speechocean762/student.yaml --label gender

recipes/speechocean762/compare.py does so for every label, guided and not, three seeds each.
"""

import sys

from prepare import prepare

from cald_speech.training.run import train

if __name__ == "__main__":
    train(sys.argv[1:], prepare)
