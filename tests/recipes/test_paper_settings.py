"""The settings of the paper's speech experiments (arXiv 2410.06846), and that teacher and student belong together."""

import pytest

from cald_speech.distillation import LossWeights
from cald_speech.training.settings import Settings
from tests.training.miniature import ROOT

# The student's loss weights before the step at which guidance ends, and that step.
GUIDED = {
    "tedlium": (LossWeights(1.0, 15.0, 1.0), 40_000),
    "slurp": (LossWeights(1.0, 15.0, 0.0), 30_000),
    "voxceleb": (LossWeights(1.0, 30.0, 0.0), 50_000),
}


@pytest.mark.parametrize("corpus", GUIDED)
def test_student_and_teacher(corpus):
    student = Settings.load(ROOT / f"hparams/{corpus}/student.yaml", {"guidance": "hybrid"})
    weights, switch_step = GUIDED[corpus]
    assert student.guidance.weights(switch_step - 1) == weights
    assert student.guidance.weights(switch_step) == LossWeights(1.0, 0.0, 0.0)
    teacher = Settings.load(ROOT / f"hparams/{corpus}/teacher.yaml")
    assert teacher.layer_map.factories(24) == [None] * 24 and teacher.teacher is None
    assert student.teacher == f"{teacher.output_folder}/model"
    assert student.options["waypoints"] == f"{teacher.output_folder}/waypoints"
    assert teacher.waypoint_every_steps == 10_000


@pytest.mark.parametrize(
    "name", [f"{corpus}/{part}" for corpus in GUIDED for part in ("student", "teacher")] + ["slurp/joint"]
)
def test_steps_of_72_utterances(name):
    settings = Settings.load(ROOT / f"hparams/{name}.yaml")
    assert settings.accumulation * settings.max_batch_utterances == 72 and settings.num_steps == 90_000
    rates = [settings.learning_rate_at(step) for step in (5_000, 80_000)]
    assert rates == pytest.approx([3e-4, 1.5e-6], rel=1e-3)
